"""A decay that begins from a copy of a stable run's checkpoint, as docs/optimizers.md shows it."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from launching import TRAIN, alone, succeed
from tiny_run import GLOBAL_BATCH, Run

from llama_ds.config.run_file import load_run
from llama_ds.data.stream import open_data
from llama_ds.training.lr_schedule import learning_rate
from llama_ds.training.self_test.plain import PlainTraining

DECAY = ["name=decayed", "training.steps=8", "optimizer.schedule=wsd", "optimizer.decay_steps=4"]


@pytest.mark.slow
def test_a_branch_is_a_run_that_decays_from_its_beginning(make_run: Callable[..., Run]) -> None:
    """Losses equal plain torch's with schedule wsd from step 1 on, to 1e-5, as in `tests/parallel/test_layouts.py`."""
    stable = make_run("stable", {"optimizer.schedule": "constant", "checkpoint.interval": 4})
    succeed(alone(TRAIN, stable.file), stable.log)
    decayed = Run(stable.file, stable.dir.parent / "decayed")
    shutil.copytree(stable.checkpoints / "step_00000004", decayed.checkpoints / "step_00000004")
    output = succeed(alone(TRAIN, stable.file, *DECAY, "checkpoint.resume=must"), stable.log)
    assert "resumed at step 4 of 8" in output
    assert "changed since step_00000004: optimizer.schedule constant -> wsd" in output

    config = load_run(str(stable.file), DECAY)
    data, plain = open_data(config), PlainTraining(config)
    rates = [learning_rate(step, config.optimizer, 8) for step in range(8)]
    assert rates[3] == config.optimizer.lr > rates[4] > rates[7]
    wanted = [
        plain.step(data.read(data.order.rows(step * GLOBAL_BATCH, GLOBAL_BATCH)).astype("int64"), rate)[0]
        for step, rate in enumerate(rates)
    ]
    assert stable.losses[:4] == pytest.approx(wanted[:4], rel=1e-5)
    steps = [line for line in decayed.metrics if "loss" in line]
    assert [line["step"] for line in steps] == [5, 6, 7, 8]
    assert [line["loss"] for line in steps] == pytest.approx(wanted[4:], rel=1e-5)
