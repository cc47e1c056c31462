"""States in bf16 do not depend on the layout, and lose no update that is smaller than a step of bf16.

In fp32, a first moment in bf16 differs between layouts where a sum that differs by 1e-7 rounds to the other neighbour,
one element in 10^4: 1e-5 relative holds for losses and norms, as in test_layouts.py. Runs in bf16 have its bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from llama_ds.config.schema import OptimizerConfig
from llama_ds.parallel.bf16_masters import Positions, bf16_and_rest, rounded_at_random
from llama_ds.parallel.elementwise import Elementwise
from tests.parallel.layout_cases import Case
from tests.parallel.layout_histories import History, check_equals_plain, histories_of

MOMENT = [
    Case(1, 1, 1, zero=1),
    Case(1, 2, 1, micro_batch=4, sequence_parallel=True, zero=3),
    Case(2, 1, 1, schedule="zb_h1"),
]
MOMENT = [replace(case, state_dtype="bf16", steps=3) for case in MOMENT]
MASTERS = [
    Case(1, 2, 1, micro_batch=4, sequence_parallel=True, masters="bf16_stochastic"),
    Case(2, 1, 1, schedule="zb_h1", tied=True, masters="bf16_kahan"),
    Case(1, 1, 2, masters="bf16_kahan", lion=True),
    Case(2, 1, 1, masters="bf16_stochastic", muon="moonlight"),
]
MASTERS = [replace(case, dtype="bf16", state_dtype="bf16", steps=4) for case in MASTERS]


@pytest.fixture(scope="module")
def history_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], History]:
    return histories_of([*MOMENT, *MASTERS], tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("case", MOMENT[1:], ids=lambda case: case.name)
def test_a_bf16_moment_is_that_of_one_rank(case: Case, history_of: Callable[[Case], History]) -> None:
    (found, validation, _), (wanted, wanted_validation, _) = history_of(case), history_of(MOMENT[0])
    for step, pair in enumerate(zip(found, wanted, strict=True)):
        assert pair[0] == pytest.approx(pair[1], rel=1e-5), f"step {step}"
    assert validation == pytest.approx(wanted_validation, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", MASTERS, ids=lambda case: case.name)
def test_bf16_masters_train_like_fp32_ones(case: Case, history_of: Callable[[Case], History]) -> None:
    """But for the norms of single updates, which are as large as the steps of bf16."""
    history, validation, norms = history_of(case)
    check_equals_plain(case, (history, validation, {"weight": norms["weight"]}), (3e-3, 4e-2))


def test_compensated_masters_take_updates_below_a_step_of_bf16() -> None:
    """200 steps of Lion, each of 2^-12 of the weight: without the compensation it would not move."""
    settings = OptimizerConfig(lr=2.0**-12, name="lion", masters="bf16_kahan", weight_decay=0.0)
    master = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = Elementwise([{"params": [master]}], settings, seed=1)
    optimizer._gradients = {id(master): torch.ones(8)}
    for _ in range(200):
        master.grad = torch.ones(8, dtype=torch.bfloat16)
        optimizer.step()
    assert torch.allclose(master.float(), torch.tensor(1 - 200 * 2.0**-12), atol=2.0**-9)


SHAPE, SEED = (6, 8), 5


def rounded(
    value: torch.Tensor, rank: int, tp: int, cut: int | None, start: int, count: int, step: int
) -> torch.Tensor:
    """Round a part's elements as a rank does that holds them behind three others of its master."""
    part = value if cut is None else value.chunk(tp, cut)[rank]
    widths = (part.shape[1], SHAPE[1]) if cut == 1 else (1, 1)
    offset = rank * (part.shape[1] if cut == 1 else part.numel())
    positions = [Positions(3, count, SEED, start, *widths, offset)]
    master = torch.cat([torch.zeros(3), part.reshape(-1)[start : start + count]])
    halves = (master[:9], 0), (master[9:], 9)  # in chunks
    return torch.cat([rounded_at_random(*half, positions, torch.tensor(float(step))) for half in halves])[3:]


def test_stochastic_rounding_depends_on_seed_step_and_place_alone() -> None:
    value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    whole = rounded(value, 0, 1, None, 0, value.numel(), step=7).view(SHAPE)
    for cut, tp, splits in ((0, 2, (0, 24)), (1, 2, (0, 11, 24)), (1, 4, (0, 12)), (None, 1, (0, 20, 48))):
        for rank in range(tp):
            parts = [rounded(value, rank, tp, cut, start, end - start, 7) for start, end in pairwise(splits)]
            wanted = whole if cut is None else whole.chunk(tp, cut)[rank]
            assert torch.equal(torch.cat(parts), wanted.reshape(-1)), (cut, tp, rank)
    assert not torch.equal(rounded(value, 0, 1, None, 0, 48, step=8).view(SHAPE), whole)


def test_stochastic_rounding_has_the_right_mean() -> None:
    """Of 10^5 elements at 0.3 of the way between two neighbours, 0.3 take the upper one: +- 0.005 is 3.4 sigma."""
    low = torch.tensor(1.0)
    high = torch.tensor(1.0 + 2**-7)
    value = (low + 0.3 * (high - low)).expand(100_000).contiguous()
    found = rounded_at_random(value, 0, [Positions(0, len(value), 9, 0, 1, 1, 0)], torch.tensor(3.0)).float()
    assert set(found.tolist()) == {1.0, 1.0 + 2**-7}
    assert abs((found == high).float().mean() - 0.3) < 0.005


def test_small_updates_add_up() -> None:
    """1,000 updates of 2^-14 to a weight of 1: nearest rounding loses all of them, since a step of bf16 is 2^-7."""
    nearest = torch.ones(4096, dtype=torch.bfloat16)
    kahan, rest, random = nearest.clone(), torch.zeros_like(nearest), nearest.clone()
    places = [Positions(0, 4096, 1, 0, 1, 1, 0)]
    for step in range(1000):
        nearest = (nearest.float() + 2**-14).bfloat16()
        kahan, rest = bf16_and_rest(kahan.float() + rest.float() + 2**-14)
        random = rounded_at_random(random.float() + 2**-14, 0, places, torch.tensor(float(step)))
    exact = 1 + 1000 * 2**-14
    assert (nearest == 1).all()
    assert (kahan.float() + rest.float() - exact).abs().max() < 2**-12
    assert abs(random.float().mean() - exact) < 2**-9  # 4 sigma of the mean of 4,096 elements
