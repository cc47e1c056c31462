"""The self-test before a run: it leaves nothing behind that changes the run, and is not repeated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from launching import TRAIN, forked, succeed
from test_run_resume import assert_same_bits
from tiny_run import LAYOUTS, Run

WORDS = "a tiny model against plain torch"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pp2_tp2", "dp2_zero3"])
def test_the_run_after_it_has_the_same_bits(
    name: str, trained: Callable[[str], Run], make_run: Callable[..., Run]
) -> None:
    whole, (ranks, changes) = trained(name), LAYOUTS[name]
    tested = make_run(f"{name}_tested", {**changes, "compute.self_test": "auto"})
    assert WORDS in succeed(forked(ranks, TRAIN, tested.file, "checkpoint.stop_at=3"), tested.log)
    assert WORDS not in succeed(forked(ranks, TRAIN, tested.file, "checkpoint.resume=must"), tested.log)
    assert tested.losses == whole.losses
    assert_same_bits(tested.newest, whole.newest)


@pytest.mark.slow
def test_it_can_be_all_that_is_done(make_run: Callable[..., Run]) -> None:
    run = make_run("only_tested", {**LAYOUTS["pp2"][1], "data.sources": [{"name": "a", "path": "absent", "weight": 1}]})
    output = succeed(forked(2, TRAIN, run.file, "--self-test"), run.log)
    assert "self-test of pp 2 x dp 1 x tp 1: loss differs by" in output
    assert not run.checkpoints.exists()
