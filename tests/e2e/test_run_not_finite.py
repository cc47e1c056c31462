"""With logging.check_finite, a run that becomes NaN names the first such layer, on every layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from launching import TRAIN, alone, forked, run
from tiny_run import Run

# A step so large that the scores of the next attention overflow float32.
EXPLODING = {"optimizer.lr": 2.5e18, "optimizer.warmup_steps": 0, "logging.check_finite": True}


@pytest.mark.slow
@pytest.mark.parametrize("pp", [1, 2])
def test_the_first_layer_with_nan_is_named(pp: int, make_run: Callable[..., Run]) -> None:
    started = make_run(f"not_finite_pp{pp}", {**EXPLODING, "parallel.pp": pp})
    done = run(forked(2, TRAIN, started.file) if pp == 2 else alone(TRAIN, started.file), started.log)
    assert done.code != 0
    assert len(done.errors) == 1 and "Traceback" not in done.output, done.output[-3000:]
    assert "logging.check_finite: decoder layer 0 of 4 outputs" in done.errors[0], done.errors
