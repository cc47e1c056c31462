"""A bit that flips in one replica's weights ends the run before the step is saved, and names the rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from launching import TRAIN, forked, run, succeed
from tiny_run import Run

# Runs a script in which rank 2's first weight has another bit from step 4 on.
FLIP = """
import os, runpy, sys
import torch
from llama_ds.training.replica_check import ReplicaCheck

compare = ReplicaCheck.before_save
def flip_and_compare(self, done):
    if os.environ["RANK"] == "2" and done == 4:
        weight = next(self._engine.module.parameters())
        weight.data.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
    compare(self, done)
ReplicaCheck.before_save = flip_and_compare
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_flipped_bit_is_found_before_it_is_saved(make_run: Callable[..., Run], tmp_path: Path) -> None:
    made = make_run("flipped", {"checkpoint.compare_replicas": 100, "checkpoint.interval": 2})
    script = tmp_path / "flip.py"
    script.write_text(FLIP)
    done = run(forked(4, script, TRAIN, made.file), made.log)
    assert done.code == 2, done.output
    assert done.output.count("error: CORRUPTION: after step 4 the weights of rank 2 on ") == 1
    assert " differ from those of the other replicas; the step is not saved; " in done.output
    assert made.newest.name == "step_00000002" and not (made.checkpoints / "step_00000004").exists()


@pytest.mark.slow
def test_replicas_of_a_pipeline_are_compared_as_the_next_step_sees_them(make_run: Callable[..., Run]) -> None:
    """A step ends while weights still travel between replicas; they must not be taken for wrong ones."""
    changes = {"checkpoint.compare_replicas": 1, "parallel.pp": 2, "training.steps": 3}
    made = make_run("pipeline", changes)
    succeed(forked(4, TRAIN, made.file), made.log)
    assert made.newest.name == "step_00000003"
