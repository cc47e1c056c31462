"""Layouts train by CUDA graphs to the same bits as without: losses, gradient norms, and the norms of every weight.

The graphs are emulated (`tests/emulated_graphs.py`); engines, messages and reductions are real. Of each layout the
layer check (`checkpoint.compare_repeats`) also computes a layer again without graphs, and compares bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.parallel.layout_cases import Case
from tests.parallel.layout_histories import History, histories_of

V = {"schedule": "zb_v", "virtual_stages": 2}
CASES = [
    Case(zero=0, recompute="full"),
    Case(zero=1, recompute="selective", dtype="bf16", neighbour=True),
    Case(1, 1, 2, zero=1),
    Case(1, 1, 2, zero=2, tied=True, micro_batch=2),
    Case(2, 1, 1, recompute="full", tied=True),
    Case(2, 1, 1, schedule="zb_h1", recompute="none,selective", extra_warmup=1),
    Case(2, 1, 1, schedule="interleaved", virtual_stages=2, recompute="full"),
    Case(2, 1, 2, schedule="zb_h1", dtype="bf16", joint_weight_gradients=2),
    Case(2, 1, 1, neighbour=True, **V),
    Case(2, 1, 2, clip=2.3, post_validation=True, recompute="none,full,selective,none", **V),
    Case(4, 1, 1, layers=8, joint_weight_gradients=2, muon="moonlight", **V),
]
EAGER = [replace(case, steps=4 if case.post_validation else 3) for case in CASES]


@pytest.fixture(scope="module")
def history_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], History]:
    return histories_of([*EAGER, *(replace(case, cuda_graphs=True) for case in EAGER)], tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("eager", EAGER, ids=lambda case: case.name)
def test_graphs_train_to_the_same_bits(eager: Case, history_of: Callable[[Case], History]) -> None:
    assert history_of(replace(eager, cuda_graphs=True)) == history_of(eager)
