"""The order: every row once per epoch, the mixture exact to one row, and the past never changed."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ds.data.order import MAX_BLOCK, MIN_BLOCK, WINDOW, BadShard, Order, Rows, Segment, permutation
from llama_ds.errors import UserError

R = 7  # rows per shard
BATCH = 64
LLAMA = [0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02]

Extents = dict[str, tuple[int, ...]]


def order_of(
    seed: int, weights: dict[str, float], extents: Extents, batch: int = BATCH, rows_per_shard: int = R
) -> Order:
    return Order(seed, batch, dict.fromkeys(weights, rows_per_shard), [Segment(0, weights, extents)])


def as_list(rows: Rows) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in rows), strict=True))


@st.composite
def histories(draw: st.DrawFn) -> list[Segment]:
    """Histories with up to four sources and five segments, in which weights change and sources grow."""
    names = [f"s{i}" for i in range(draw(st.integers(1, 4)))]
    extents = {name: tuple(draw(st.lists(st.integers(1, 150), min_size=1, max_size=2))) for name in names}
    segments, step = [], 0
    for _ in range(draw(st.integers(1, 5))):
        weights = {name: draw(st.one_of(st.just(0.0), st.floats(0.05, 1.0))) for name in names}
        weights[names[0]] = weights[names[0]] or 0.5
        segments.append(Segment(step, weights, dict(extents)))
        step += draw(st.integers(1, 6))
        grown = draw(st.sets(st.sampled_from(names)))
        extents = {n: (*e, draw(st.integers(1, 150))) if n in grown else e for n, e in extents.items()}
    return segments


def order_with(history: list[Segment], seed: int) -> Order:
    return Order(seed, BATCH, dict.fromkeys(history[0].weights, R), history)


@settings(deadline=None, max_examples=25)
@given(history=histories(), seed=st.integers(0, 2**32), start=st.integers(0, 10**10))
def test_random_access_returns_the_same_rows(history: list[Segment], seed: int, start: int) -> None:
    for first in (start, 0):  # far beyond the history, and inside it
        together = as_list(order_with(history, seed).rows(first, 700))
        for i in (699, 7, 0, 400):
            assert as_list(order_with(history, seed).rows(first + i, 1)) == [together[i]]


@settings(deadline=None, max_examples=40)
@given(history=histories(), seed=st.integers(0, 2**32))
def test_every_row_is_read_once_per_epoch_even_if_a_source_grows(history: list[Segment], seed: int) -> None:
    order, last = order_with(history, seed), history[-1]
    count = max(3 * MIN_BLOCK, (last.step + 10) * BATCH)
    seen: dict[tuple[int, int], list[int]] = {}
    for source, epoch, row in as_list(order.rows(0, count)):
        seen.setdefault((source, epoch), []).append(row)
    for (source, epoch), rows in seen.items():
        name = order.names[source]
        sizes = {sum(segment.extents[name]) for segment in history}
        if (source, epoch + 1) in seen:  # a complete epoch: all rows that the source had at its end
            assert sorted(rows) == list(range(len(rows))) and len(rows) in sizes
        else:
            assert len(rows) == len(set(rows)) and set(rows) <= set(range(max(sizes)))


@settings(deadline=None, max_examples=40)
@given(history=histories(), seed=st.integers(0, 2**32), change=st.integers(0, 4))
def test_later_segments_do_not_change_the_past(history: list[Segment], seed: int, change: int) -> None:
    change = min(change, len(history) - 1)
    before, after = order_with(history[: change + 1], seed), order_with(history, seed)
    until = history[change + 1].step if change + 1 < len(history) else history[-1].step + 5
    for step in range(until):
        assert as_list(before.at(step)) == as_list(after.at(step))
    consumed = [[rows for rows, _ in order.consumed(until).values()] for order in (before, after)]
    assert consumed[0] == consumed[1]


def test_new_rows_join_the_epoch_in_progress() -> None:
    old, new = {"a": (10 * R * WINDOW,)}, {"a": (10 * R * WINDOW, 4 * R * WINDOW)}
    order = Order(1, R, {"a": R}, [Segment(0, {"a": 1.0}, old), Segment(30, {"a": 1.0}, new)])
    rows = as_list(order.rows(0, 14 * R * WINDOW))
    assert {epoch for _, epoch, _ in rows} == {0} and sorted(row for _, _, row in rows) == list(range(14 * R * WINDOW))
    begun = -(-30 // WINDOW) * WINDOW * R  # a started window is finished first
    late = [row >= 10 * R * WINDOW for _, _, row in rows]
    assert not any(late[:begun]) and any(late[begun : begun + 3 * WINDOW * R])


@settings(deadline=None, max_examples=30)
@given(weights=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=8), block=st.integers(0, 20))
def test_the_mixture_is_exact_to_one_row_at_every_block(weights: list[float], block: int) -> None:
    names = {str(i): w for i, w in enumerate(weights)}
    size = order_of(0, names, dict.fromkeys(names, (997,)))._mixes[0].block
    order = order_of(0, names, dict.fromkeys(names, (997,)), batch=size)
    before = [rows for rows, _ in order.consumed(block).values()]
    assert sum(before) == block * size
    for count, weight in zip(before, weights, strict=True):
        assert abs(count - block * size * weight / sum(weights)) <= 1 + 1e-6
    counts = Counter(order.rows(block * size, size).source.tolist())
    after = [rows for rows, _ in order.consumed(block + 1).values()]
    assert [b + counts[i] for i, b in enumerate(before)] == after


@settings(deadline=None, max_examples=40)
@given(history=histories(), seed=st.integers(0, 2**32), step=st.integers(0, 40))
def test_consumption_is_what_was_read(history: list[Segment], seed: int, step: int) -> None:
    order = order_with(history, seed)
    rows = order.rows(0, step * BATCH)
    for source, (name, (count, epochs)) in enumerate(order.consumed(step).items()):
        own = rows.source == source
        assert count == own.sum(), name
        if count:
            assert rows.epoch[own].max() in (int(epochs), int(epochs) - (epochs == int(epochs)))


def test_the_llama_mixture_of_a_whole_run() -> None:
    names = {str(i): w for i, w in enumerate(LLAMA)}
    order = order_of(1, names, dict.fromkeys(names, (10**8,)), batch=2048, rows_per_shard=16384)
    steps = 350_000
    assert order._mixes[0].block == MIN_BLOCK
    for (rows, epochs), weight in zip(order.consumed(steps).values(), LLAMA, strict=True):
        assert abs(rows - steps * 2048 * weight) <= 1.01
        assert epochs == rows / 10**8


@pytest.mark.parametrize("weight", [1e-300, 1e-13, 1e-12, 2e-8])
def test_a_mixture_that_is_too_uneven_is_refused(weight: float) -> None:
    """Otherwise its first step would take all memory, or the source would never be read."""
    with pytest.raises(UserError, match=rf"^weight {weight:g} of source b is .* of the mixture from step 0 on, .* set"):
        order_of(0, {"a": 0.0, "b": weight, "c": 1.0}, {"a": (9,), "b": (9,), "c": (9,)})
    least = order_of(0, {"b": 4e-8, "c": 1.0}, {"b": (9,), "c": (9,)})
    assert least._mixes[0].block == MAX_BLOCK


@given(step=st.integers(0, 10**6), dp=st.sampled_from([1, 2, 3, 4, 6, 12]))
@settings(deadline=None)
def test_a_step_is_the_same_rows_at_any_dp(step: int, dp: int) -> None:
    order = order_of(3, {"a": 0.7, "b": 0.3}, {"a": (100, 50, 7), "b": (60,)}, batch=12)
    ranks = [as_list(order.at(step, rank, dp)) for rank in range(dp)]
    assert [row for rank in ranks for row in rank] == as_list(order.at(step))
    assert sorted(as_list(order.at(step))) == sorted(as_list(order.rows(step * 12, 12)))


def test_a_rank_reads_forward_through_few_shards() -> None:
    order = order_of(9, {"a": 1.0}, {"a": (64 * 1024,)}, batch=256, rows_per_shard=1024)
    of_rank = [
        {int(row) // 1024 for step in range(WINDOW * 4) for row in order.at(step, rank, 8).row} for rank in range(8)
    ]
    assert max(map(len, of_rank)) <= 3  # 8 shards are open
    assert all(a <= b for a, b in pairwise(order.at(5).row.tolist()))


def test_seed_and_name_change_the_order_and_a_new_source_does_not() -> None:
    def of_a(seed: int, weights: dict[str, float]) -> list[int]:
        rows = order_of(seed, weights, dict.fromkeys(weights, (1000,))).rows(0, 2000)
        return rows.row[rows.source == list(weights).index("a")][:100].tolist()

    assert of_a(1, {"a": 0.5, "b": 0.5}) == of_a(1, {"a": 0.5, "c": 0.1, "b": 0.4})
    assert of_a(1, {"a": 0.5}) != of_a(2, {"a": 0.5})
    assert of_a(1, {"a": 0.5}) != of_a(1, {"z": 0.2, "a": 0.5})[1:]
    a = order_of(1, {"a": 1.0}, {"a": (1000,)}).rows(0, 100).row.tolist()
    assert a != order_of(1, {"b": 1.0}, {"b": (1000,)}).rows(0, 100).row.tolist()


def test_the_order_is_frozen() -> None:
    """A change of these numbers breaks the resumption of every existing run."""
    assert permutation(8, "key", 1).tolist() == [0, 2, 5, 3, 1, 6, 7, 4]
    history = [
        Segment(0, {"a": 0.75, "b": 0.25}, {"a": (2000,), "b": (64,)}),
        Segment(5, {"a": 0.5, "b": 0.5}, {"a": (2000, 150), "b": (64,)}),
    ]
    order = Order(1234, 8, {"a": 100, "b": 64}, history)
    assert as_list(order.rows(10**6, 4)) == [(1, 7812, 31), (0, 232, 1215), (1, 7812, 41), (0, 232, 515)]
    near = [(0, 0, 6), (0, 0, 739), (0, 0, 1498), (0, 0, 78), (0, 0, 646), (0, 0, 758)]
    assert as_list(order.at(4))[:3] + as_list(order.at(5))[:3] == near


def test_rows_stay_within_a_window_of_shards() -> None:
    order = order_of(5, {"a": 1.0}, {"a": (100 * R,)}, batch=1)
    for window in range(0, 100 * R, WINDOW * R):
        shards = {row // R for row in order.rows(window, min(WINDOW * R, 100 * R - window)).row.tolist()}
        assert len(shards) == min(WINDOW, 100 - window // R)


@settings(deadline=None, max_examples=15)
@given(history=histories(), seed=st.integers(0, 99), bad=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 60))))
def test_damaged_shards_are_replaced_from_their_step_on(
    history: list[Segment], seed: int, bad: list[tuple[int, int]]
) -> None:
    """Only their rows change, to rows of intact shards of the same source; earlier steps and other rows stay."""
    whole, name = order_with(history, seed), "s0"
    shards = min(sum(-(-rows // R) for rows in segment.extents[name]) for segment in history)
    ledger = [BadShard(step, name, shard % shards) for step, shard in bad][: shards - 1]
    repaired = order_with(history, seed)
    repaired.replace_shards(ledger)
    ends = np.cumsum([min(R, e - i) for e in history[-1].extents[name] for i in range(0, e, R)])
    for step in range(20):
        bad_now = {b.shard for b in ledger if b.step <= step}
        start = step * BATCH
        for (source, epoch, row), new in zip(
            as_list(whole.rows(start, BATCH)), as_list(repaired.rows(start, BATCH)), strict=True
        ):
            shard = int(np.searchsorted(ends, row, side="right"))
            if source == 0 and shard in bad_now:
                assert new[:2] == (source, epoch)
                assert int(np.searchsorted(ends, new[2], side="right")) not in bad_now
            else:
                assert new == (source, epoch, row)


def test_a_damaged_shard_is_replaced_from_the_first_row_of_its_step() -> None:
    """That row would still be read from the damaged file."""
    weights, extents = {"s": 1.0}, {"s": (4 * R,)}
    for step in range(20):
        (damaged,) = order_of(1, weights, extents).rows(step * BATCH, 1).row // R
        mended = order_of(1, weights, extents)
        mended.replace_shards([BadShard(step, "s", int(damaged))])
        assert mended.rows(step * BATCH, 1).row[0] // R != damaged


def test_all_rows_of_a_short_shard_stand_in_for_a_damaged_one() -> None:
    """The run would train on one row again and again."""
    order = order_of(1, {"s": 1.0}, {"s": (R + 3,)})
    order.replace_shards([BadShard(0, "s", 0)])
    epoch = Counter(order.rows(0, R + 3).row.tolist())
    assert epoch.keys() == {R, R + 1, R + 2}
    assert max(epoch.values()) - min(epoch.values()) <= 1


def test_permutation_is_complete_and_depends_on_its_key() -> None:
    assert sorted(permutation(1000, 1, "x").tolist()) == list(range(1000))
    assert not np.array_equal(permutation(1000, 1, "x"), permutation(1000, 2, "x"))


@pytest.mark.parametrize(
    "segments",
    [
        [],
        [Segment(1, {"a": 1.0}, {"a": (5,)})],
        [Segment(0, {"a": 1.0}, {"a": (5,)}), Segment(0, {"a": 1.0}, {"a": (5,)})],
        [Segment(0, {"a": 0.0}, {"a": (5,)})],
        [Segment(0, {"a": 1.0}, {"a": ()})],
        [Segment(0, {"a": 1.0}, {"a": (5,)}), Segment(1, {"a": 1.0}, {"a": (6,)})],
    ],
)
def test_an_invalid_history_is_refused(segments: list[Segment]) -> None:
    with pytest.raises(ValueError):
        Order(0, BATCH, {"a": R}, segments)
