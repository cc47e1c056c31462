"""The order: every row once per epoch, the mixture kept to the row, and no memory of what came before."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ds.data.order import MIN_BLOCK, Order, permutation

Sources = list[tuple[str, float, list[int]]]
LLAMA = [0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02]


@st.composite
def mixtures(draw: st.DrawFn) -> Sources:
    count = draw(st.integers(1, 5))
    return [
        (f"s{i}", draw(st.floats(0.01, 1.0)), draw(st.lists(st.integers(1, 30), min_size=1, max_size=20)))
        for i in range(count)
    ]


@settings(deadline=None, max_examples=30)
@given(sources=mixtures(), seed=st.integers(0, 2**32), start=st.integers(0, 10**12))
def test_any_row_can_be_asked_for_alone(sources: Sources, seed: int, start: int) -> None:
    together = Order(seed, sources).rows(start, 50)
    for i in (49, 7, 0):
        assert Order(seed, sources).rows(start + i, 1) == [together[i]]


@settings(deadline=None, max_examples=30)
@given(sources=mixtures(), seed=st.integers(0, 2**32))
def test_every_row_comes_once_per_epoch(sources: Sources, seed: int) -> None:
    seen: dict[tuple[int, int], list[int]] = {}
    for source, epoch, row in Order(seed, sources).rows(0, 3 * MIN_BLOCK):
        seen.setdefault((source, epoch), []).append(row)
    for (source, epoch), rows in seen.items():
        size = sum(sources[source][2])
        if (source, epoch + 1) in seen:
            assert sorted(rows) == list(range(size))
        else:
            assert len(rows) == len(set(rows)) and set(rows) <= set(range(size))
    finished = [rows for (source, epoch), rows in seen.items() if len(rows) == sum(sources[source][2]) >= 30]
    assert len({tuple(rows) for rows in finished}) == len(finished)  # no epoch and no source in another's order


@settings(deadline=None, max_examples=30)
@given(weights=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=8), block=st.integers(0, 20))
def test_the_mixture_is_exact_to_one_row_at_every_block(weights: list[float], block: int) -> None:
    order = Order(0, [(str(i), w, [997]) for i, w in enumerate(weights)])
    size = order._block
    before = [round(e * 997) for e in order.epochs(block * size).values()]
    assert sum(before) == block * size
    for count, weight in zip(before, weights, strict=True):
        assert abs(count - block * size * weight / sum(weights)) <= 1 + 1e-6
    counts = Counter(source for source, _, _ in order.rows(block * size, size))
    after = [round(e * 997) for e in order.epochs((block + 1) * size).values()]
    assert [b + counts[i] for i, b in enumerate(before)] == after


def test_the_llama_mixture_of_a_whole_run() -> None:
    order = Order(1, [(str(i), w, [10**6] * 100) for i, w in enumerate(LLAMA)])
    rows = 350_000 * 2048
    epochs = order.epochs(rows)
    assert order._block == MIN_BLOCK
    for i, weight in enumerate(LLAMA):
        assert abs(epochs[str(i)] * 10**8 - rows * weight) <= 1.01


@given(step=st.integers(0, 10**6), dp=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_a_step_is_the_same_rows_at_any_dp(step: int, dp: int) -> None:
    order = Order(3, [("a", 0.7, [100, 50, 7]), ("b", 0.3, [60])])
    ranks = [order.at(step, 12, rank, dp) for rank in range(dp)]
    assert [row for rank in ranks for row in rank] == order.rows(step * 12, 12)


def test_seed_and_name_change_the_order_and_a_new_source_does_not() -> None:
    def of_a(seed: int, sources: Sources) -> list[int]:
        return [row for source, _, row in Order(seed, sources).rows(0, 2000) if source == 0][:100]

    a = ("a", 0.5, [1000])
    assert of_a(1, [a, ("b", 0.5, [1000])]) == of_a(1, [a, ("c", 0.1, [10]), ("b", 0.4, [1000])])
    assert of_a(1, [a]) != of_a(2, [a])
    assert of_a(1, [a]) != of_a(1, [("z", 0.5, [1000])])


def test_the_order_is_frozen() -> None:
    """A change of these numbers breaks the resumption of every run in flight."""
    assert permutation(8, "key", 1).tolist() == [0, 2, 5, 3, 1, 6, 7, 4]
    order = Order(1234, [("a", 0.75, [100] * 20), ("b", 0.25, [64])])
    assert order.rows(10**6, 4) == [(0, 375, 1423), (0, 375, 121), (1, 3906, 19), (0, 375, 1475)]


def test_rows_stay_within_a_window_of_shards() -> None:
    order = Order(5, [("a", 1.0, [10] * 100)])
    for window in range(0, 1000, 80):
        shards = {row // 10 for _, _, row in order.rows(window, min(80, 1000 - window))}
        assert len(shards) == min(8, 100 - window // 10)


def test_permutation_is_one_and_depends_on_its_key() -> None:
    assert sorted(permutation(1000, 1, "x").tolist()) == list(range(1000))
    assert not np.array_equal(permutation(1000, 1, "x"), permutation(1000, 2, "x"))
