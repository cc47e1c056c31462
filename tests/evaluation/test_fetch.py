"""tools/evaluate.py fetch through the hub's own client, from a server that speaks its protocol."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from llama_ds.evaluation.fetch import PARQUET
from llama_ds.evaluation.suite import TASKS, read_examples
from tests.evaluation.hub import served

ROOT = Path(__file__).resolve().parents[2]


def parquet(*questions: str) -> bytes:
    """Return a Parquet file with these questions in the layout of ARC."""
    choices = {"text": ["one", "two"], "label": ["A", "B"]}
    lines = [{"id": text, "question": text, "choices": choices, "answerKey": "B"} for text in questions]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), file)
    return file.getvalue()


def call(tmp_path: Path, tasks: str, **settings: str) -> Any:
    """Start Python, because the client reads its settings when it is imported; its cache is empty."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1", **settings}
    command = [sys.executable, "tools/evaluate.py", "fetch", tasks, "--data", str(tmp_path / "data")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def test_a_task_is_fetched_from_the_hub(tmp_path: Path) -> None:
    """Both parts of the split in their order, nothing of other splits. What cannot be fetched is one line."""
    files = {
        "ARC-Easy/test/0000.parquet": parquet("q0", "q1"),
        "ARC-Easy/test/0001.parquet": parquet("q2"),
        "ARC-Easy/partial-train/0000.parquet": parquet("shown"),
        "ARC-Easy/validation/0000.parquet": parquet("other"),
        "ARC-Challenge/test/0000.parquet": parquet("other"),
    }
    with served("allenai/ai2_arc", PARQUET, files) as (address, asked):
        done = call(tmp_path, "arc_easy", HF_ENDPOINT=address)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            str(tmp_path / f"data/arc_easy/{split}.jsonl") for split in ("test", "train")
        ]
        assert not [
            path for path in asked if path.endswith(("validation/0000.parquet", "ARC-Challenge/test/0000.parquet"))
        ]
        unknown = call(tmp_path, "piqa", HF_ENDPOINT=address)
    task, data = TASKS["arc_easy"], str(tmp_path / "data")
    assert [one.contexts[0] for one in read_examples(data, task)] == [f"Question: q{n}\nAnswer:" for n in range(3)]
    assert [one.contexts[0] for one in read_examples(data, task, shown=True)] == ["Question: shown\nAnswer:"]
    offline = call(tmp_path, "piqa", HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    for refused in (unknown, offline):
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.count("\n") == 1 and "cannot be fetched" in refused.stderr, refused.stderr
    assert not (tmp_path / "data/piqa/validation.jsonl").exists()
