"""Checkpoints in memory: a run that failed goes on after its last step, and its losses are those of a whole run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import TRAIN, forked, run, succeed
from tiny_run import Run

from llama_ds.job.memory_slots import run_folder

FAILING = Path(__file__).with_name("failing_rank.py")
CHANGES = {"parallel.pp": 2, "checkpoint.interval": 3, "deepspeed.bf16.enabled": True}
IN_STEP_5 = 35  # call of a layer: two layers on a stage, four micro-batches a step


@pytest.mark.slow
def test_a_failed_run_loses_no_finished_step(make_run: Callable[..., Run], tmp_path: Path) -> None:
    whole = make_run("memory_whole", CHANGES)
    succeed(forked(2, TRAIN, whole.file), whole.log)
    failed = make_run("memory", CHANGES | {"checkpoint.memory_interval": 1, "checkpoint.memory_folder": str(tmp_path)})
    kept = run_folder(str(tmp_path), str(failed.dir))
    try:
        assert run(forked(2, FAILING, "forward", IN_STEP_5, 1, "broken", failed.file), failed.log).code != 0
        assert failed.newest.name == "step_00000003" and list(kept.iterdir())
        shutil.move(failed.newest, failed.newest.with_suffix(".moved"))  # it is not read
        output = succeed(forked(2, TRAIN, failed.file), failed.log)
    finally:
        shutil.rmtree(kept, ignore_errors=True)
    assert "MEMORY CHECKPOINT: step 4 is in the memory of the hosts" in output
    assert "resumed at step 4 of 6" in output
    assert failed.losses == whole.losses and failed.validation_loss == whole.validation_loss
    assert not kept.exists()
