"""A run whose batch grows is plain torch with batches of these sizes, on both engines, in one start or in several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from launching import TRAIN, alone, forked, succeed
from test_run_resume import assert_same_bits
from tiny_run import SEQ_LEN, STEPS, Run

from llama_ds.config.run_file import load_run
from llama_ds.data.stream import open_data
from llama_ds.training.lr_schedule import learning_rate
from llama_ds.training.self_test.plain import PlainTraining

ROWS = [4, 4, 8, 8, 16, 16]
CHANGES: dict[str, Any] = {
    "training.batch_stages": [{"global_batch": 4, "until_step": 2}, {"global_batch": 8, "until_step": 4}],
    "training.global_batch": 16,
}


def plain_losses(run: Run) -> list[float]:
    """Train the run's rows in plain torch on one rank, each step with its batch; return the losses."""
    config = load_run(str(run.file))
    data, plain, first, losses = open_data(config), PlainTraining(config), 0, []
    for step, rows in enumerate(ROWS):
        batch = data.read(data.order.rows(first, rows)).astype("int64")
        losses.append(plain.step(batch, learning_rate(step, config.optimizer, STEPS))[0])
        first += rows
    return losses


@pytest.mark.slow
def test_a_growing_batch_is_exact_over_the_switch_and_across_a_resume(make_run: Callable[..., Run]) -> None:
    """1e-5 relative: fp32 against float64, as in `tests/parallel/test_layouts.py`."""
    whole = make_run("whole", CHANGES)
    output = succeed(alone(TRAIN, whole.file), whole.log)
    assert "step 2 ends a stage of training.batch_stages; the next one starts from its checkpoint" in output
    assert "changed since step_00000002: training.global_batch 4 -> 8" in output
    wanted = plain_losses(whole)
    assert whole.losses == pytest.approx(wanted, rel=1e-5)
    steps = [line for line in whole.metrics if "loss" in line]
    assert [line["tokens"] for line in steps] == [SEQ_LEN * sum(ROWS[: step + 1]) for step in range(STEPS)]
    read = [line for line in whole.metrics if "tokens/code" in line][-1]
    assert read["tokens/code"] + read["tokens/prose"] == SEQ_LEN * sum(ROWS)

    piped = {**CHANGES, "parallel.pp": 2, "parallel.schedule": "zb_h1"}
    unbroken, parts = make_run("unbroken", piped), make_run("parts", piped)
    succeed(forked(2, TRAIN, unbroken.file), unbroken.log)
    assert unbroken.losses == pytest.approx(wanted, rel=1e-5)
    succeed(forked(2, TRAIN, parts.file, "checkpoint.stop_at=3"), parts.log)
    assert "resumed at step 3 of 6" in succeed(forked(2, TRAIN, parts.file), parts.log)
    assert parts.losses == unbroken.losses and parts.validation_loss == unbroken.validation_loss
    assert_same_bits(parts.newest, unbroken.newest)
