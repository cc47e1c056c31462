"""A step with a non-finite gradient norm changes no weight and no moment, without a host synchronisation."""

from __future__ import annotations

import pytest

from tests import warm
from tests.parallel.layout_cases import Case
from tests.parallel.not_finite_worker import PIPELINE, PLAIN


@pytest.mark.slow
@pytest.mark.parametrize("case", [PIPELINE, PLAIN], ids=["pipeline", "without ZeRO"])
def test_step_that_is_not_finite_is_left_out(case: Case) -> None:
    """The end of a step also reads nothing from the device; `not_finite_worker.py` asserts both on every rank."""
    done = warm.run("-m", "tests.parallel.not_finite_worker", ranks=case.world)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("fine") == case.world
