"""Lion under every layout is plain Lion on one rank: losses and gradient norms, step by step.

1e-5 relative in fp32, as in test_layouts.py. The sign of an element is a step of its own: an element smaller than its
rounding may take the other sign under another layout. In 3 steps of these cases none of them shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.parallel.layout_cases import Case
from tests.parallel.layout_histories import History, check_equals_plain, histories_of

CASES = [
    Case(1, 1, 2, zero=0),
    Case(1, 1, 2, zero=2, tied=True),
    Case(1, 2, 1, micro_batch=4, sequence_parallel=True, zero=3),
    Case(2, 1, 1, schedule="zb_h1", tied=True),
]
CASES = [replace(case, lion=True, steps=3) for case in CASES]


@pytest.fixture(scope="module")
def history_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], History]:
    return histories_of(CASES, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_equals_plain_lion(case: Case, history_of: Callable[[Case], History]) -> None:
    check_equals_plain(case, history_of(case), (1e-5, 1e-5))
