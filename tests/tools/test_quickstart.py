"""`make quickstart` does the whole job: from text on this machine to text from the exported model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60  # of its 300: enough to pass the unigram model


def quickstart(folder: Path) -> str:
    """Run it with its files in `folder` and return what it printed."""
    data = folder / "quickstart" / "data"
    overrides = [f"output_dir={folder}", f"data.tokenizer={data}/tokenizer.model", f"training.steps={STEPS}"]
    overrides += [f"data.sources.{i}.path={data}/shards/{name}" for i, name in enumerate(("code", "prose"))]
    command = [sys.executable, "tools/quickstart.py", *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def losses(output: str) -> tuple[float, float, float]:
    """Return the validation loss as trained, the unigram model's, and the exported model's by transformers."""
    trained, unigram = re.search(r"validation loss +([\d.]+) .* unigram model's ([\d.]+)", output).groups()  # type: ignore[union-attr]
    exported = re.search(r"the same rows +([\d.]+) by transformers", output).group(1)  # type: ignore[union-attr]
    return float(trained), float(unigram), float(exported)


@pytest.mark.slow
def test_the_whole_job_and_a_second_call(tmp_path: Path) -> None:
    output = quickstart(tmp_path)
    trained, unigram, exported = losses(output)
    assert trained < unigram - 0.1
    assert exported == pytest.approx(trained, abs=1e-3)
    assert f"resumed at step {STEPS // 2} of {STEPS}" in output
    assert output.count("--- '") == 2  # both prompts are answered
    assert not re.search(r"Warning|\[INFO\]|it/s\]|USDT:|Loading weights", output)  # as libraries say

    again = quickstart(tmp_path)
    assert losses(again) == (trained, unigram, exported)
    assert "=== Corpus" not in again and "step 1/" not in again  # nothing is done twice
