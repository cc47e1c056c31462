"""logging.trace_step leaves a record of one step that `throughput.py analyse` reads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, TRAIN, deepspeed, environment, succeed
from tiny_run import Run


@pytest.mark.slow
@pytest.mark.parametrize("schedule, virtual_stages", [("zb_h1", 1), ("dualpipe_v", 2)])
def test_traced_step_is_analysed(
    schedule: str, virtual_stages: int, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    changes = {"parallel.pp": 2, "parallel.schedule": schedule, "parallel.virtual_stages": virtual_stages}
    run = make_run(f"traced_{schedule}", {**changes, "logging.trace_step": 2, "parallel.recompute": "auto"})
    output = succeed(deepspeed(2, TRAIN, run.file), run.log)
    assert "kept activations" in output, "recompute: auto prints its table"
    command = [sys.executable, str(ROOT / "tools" / "throughput.py"), "analyse", str(run.dir / "trace"), "--json"]
    done = subprocess.run(
        [*command, "--svg", str(tmp_path / "step.svg")], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr
    (step,) = json.loads(done.stdout).values()
    assert step["ranks"] == 2 and 0 < step["compute"] < 1
    recorded = json.loads((run.dir / "trace" / "rank00001.json").read_text())
    forwards = [event for event in recorded["events"] if event["what"] == "F"]
    assert len(forwards) == 4 * virtual_stages  # a global batch of 8 rows, 2 in a micro-batch
    assert (tmp_path / "step.svg").read_text().startswith("<svg")
