"""A bit that flips in weights or moments ends the run before the step is saved or taken, and names the rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from launching import TRAIN, forked, run
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


# Runs a script in which a bit of rank 3's moments flips before step 4.
FLIP_MOMENTS = """
import os, runpy, sys
import torch
from llama_ds.parallel.optimizer_state import flat_states
from llama_ds.training.step_checks import StateCheck

prepare = StateCheck.before_step
def flip_and_prepare(self, step):
    if os.environ["RANK"] == "3" and step == 4:
        list(flat_states(self._engine))[-1].view(torch.int32)[7] ^= 1
    prepare(self, step)
StateCheck.before_step = flip_and_prepare
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_step_of_a_pipeline_is_not_taken_with_wrong_moments(make_run: Callable[..., Run], tmp_path: Path) -> None:
    """Until then no check raises an alarm, also not for weights that still travel between replicas."""
    interval = {f"checkpoint.{key}": 1 for key in ("compare_replicas", "compare_repeats", "interval")}
    always = {f"checkpoint.{key}": True for key in ("compare_norms", "compare_states")}
    made = make_run("pipeline", interval | always | {"parallel.pp": 2, "training.steps": 5})
    script = tmp_path / "flip.py"
    script.write_text(FLIP_MOMENTS)
    done = run(forked(4, script, TRAIN, made.file), made.log)
    assert done.code == 2, done.output
    assert done.output.count("error: CORRUPTION: before step 4 masters or moments of rank 3 on ") == 1
    assert made.newest.name == "step_00000003"
