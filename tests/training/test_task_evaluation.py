"""Tasks along training that a run's engine cannot do are refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ds.config.run_file import load_run
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout
from llama_ds.training.task_evaluation import TaskEvaluation

QUICKSTART = str(Path(__file__).resolve().parents[2] / "ds_configs" / "quickstart.yaml")


def test_tasks_that_generate_are_refused_where_the_engine_cannot() -> None:
    run = load_run(QUICKSTART, ["evaluation.tasks=[gsm8k]", "parallel.schedule=deepspeed"])
    with pytest.raises(UserError, match=r"gsm8k generates text, which parallel\.schedule = deepspeed cannot"):
        TaskEvaluation(run, resolve_layout(run, 8), None)  # type: ignore[arg-type]
