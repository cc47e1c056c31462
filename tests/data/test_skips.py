"""A run that skips rows reads the rows after them, does not count the skipped rows, and remembers the skips."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_order import BATCH, R, as_list, histories
from test_order import order_with as plain_order

from llama_ds.config.schema import DataConfig, MixtureStage, SkipConfig, SourceConfig
from llama_ds.data.mixture import DataState, continued, planned, state_from_json
from llama_ds.data.order import BadShard, Order, Segment
from llama_ds.data.skips import Skip
from llama_ds.data.source.manifest import Extent, Split
from llama_ds.errors import UserError

STEPS = 30
TOKENS = 240  # tokens per step

Ask = tuple[tuple[int, int], ...]  # (at_step, steps)


@st.composite
def skips(draw: st.DrawFn) -> list[Skip]:
    at = sorted(draw(st.sets(st.integers(0, STEPS - 1), max_size=4)))
    return [Skip(step, draw(st.integers(1, 9))) for step in at]


def passed_over(skips: list[Skip], until: int, first: bool = True) -> int:
    """Return the number of stream steps skipped before `until`, with `first` including a skip at `until` itself."""
    return sum(skip.steps for skip in skips if skip.step < until or (first and skip.step == until))


def order_with(history: list[Segment], seed: int, skips: list[Skip]) -> Order:
    return Order(seed, BATCH, dict.fromkeys(history[0].weights, R), history, (), skips)


def later(history: list[Segment], skips: list[Skip]) -> list[Segment]:
    """Return the history of a run without skips, whose stages start later by the number of skipped steps."""
    return [replace(s, step=s.step + passed_over(skips, s.step, first=False)) for s in history]


@settings(deadline=None, max_examples=40)
@given(history=histories(), seed=st.integers(0, 2**32), skips=skips(), dp=st.sampled_from([1, 2, 4, 8]))
def test_a_step_after_skips_reads_later_rows(history: list[Segment], seed: int, skips: list[Skip], dp: int) -> None:
    """A rank that shifted its rows differently would train on rows twice, or on the rows of the spike again."""
    order, plain = order_with(history, seed, skips), plain_order(later(history, skips), seed)
    for step in range(STEPS):
        wanted = step + passed_over(skips, step)
        for rank in range(dp):
            assert as_list(order.at(step, rank, dp)) == as_list(plain.at(wanted, rank, dp))


@settings(deadline=None, max_examples=25)
@given(history=histories(), seed=st.integers(0, 99), skips=skips(), start=st.integers(0, 9 * BATCH))
def test_rows_are_those_of_the_steps(history: list[Segment], seed: int, skips: list[Skip], start: int) -> None:
    order = order_with(history, seed, skips)
    one_by_one = [row for i in range(start, start + 200, 8) for row in as_list(order.rows(i, 8))]
    assert as_list(order.rows(start, 200)) == one_by_one
    step = -(-start // BATCH)
    assert sorted(as_list(order.rows(step * BATCH, BATCH))) == sorted(as_list(order.at(step)))


@settings(deadline=None, max_examples=25)
@given(history=histories(), seed=st.integers(0, 2**32), skips=skips())
def test_every_row_is_read_once_per_epoch_and_skipped_rows_never(
    history: list[Segment], seed: int, skips: list[Skip]
) -> None:
    order, plain = order_with(history, seed, skips), plain_order(later(history, skips), seed)
    last = STEPS + passed_over(skips, STEPS)
    read = Counter(as_list(order.rows(0, STEPS * BATCH)))
    windows: Counter[tuple[int, int, int]] = Counter()
    for skip in skips:
        first = skip.step + passed_over(skips, skip.step, first=False)
        windows.update(as_list(plain.rows(first * BATCH, skip.steps * BATCH)))
    assert max(read.values()) == 1 and not read & windows
    assert read + windows == Counter(as_list(plain.rows(0, last * BATCH)))


@settings(deadline=None, max_examples=30)
@given(history=histories(), seed=st.integers(0, 2**32), skips=skips(), step=st.integers(0, STEPS))
def test_consumption_is_what_was_read(history: list[Segment], seed: int, skips: list[Skip], step: int) -> None:
    """Otherwise skipped rows would be reported as trained on, and a source as read completely."""
    order = order_with(history, seed, skips)
    rows = order.rows(0, step * BATCH)
    for source, (name, (count, epochs)) in enumerate(order.consumed(step).items()):
        own = rows.source == source
        assert count == own.sum()
        if len({segment.extents[name] for segment in history}) == 1:
            assert epochs == pytest.approx(count / sum(history[0].extents[name]))
        else:
            assert 0 <= epochs <= plain_order(later(history, skips), seed).consumed(step + 99)[name][1]


def test_the_rows_after_a_skip_are_frozen() -> None:
    """A change of these numbers breaks the resumption of every existing run with skips."""
    history = [
        Segment(0, {"a": 0.75, "b": 0.25}, {"a": (2000,), "b": (64,)}),
        Segment(5, {"a": 0.5, "b": 0.5}, {"a": (2000, 150), "b": (64,)}),
    ]
    order = Order(1234, 8, {"a": 100, "b": 64}, history, (), [Skip(3, 2), Skip(5, 4)])
    assert as_list(order.at(2))[:3] == [(0, 0, 32), (0, 0, 725), (0, 0, 748)]
    assert as_list(order.at(3))[:3] == [(0, 0, 78), (0, 0, 646), (0, 0, 758)]
    assert as_list(order.at(5))[:3] == [(0, 0, 801), (0, 0, 858), (0, 0, 1013)]
    assert as_list(order.rows(10**6, 2)) == [(0, 232, 1033), (0, 232, 2082)]


def test_damaged_shards_are_replaced_from_their_run_step_on() -> None:
    history = [Segment(0, {"a": 1.0}, {"a": (100 * R,)})]
    order, plain = order_with(history, 3, [Skip(4, 3)]), plain_order(history, 3)
    for read, bad_from in ((3, 4), (4, 4), (4, 5), (7, 5)):
        rows = plain.at(read + 3 if read >= 4 else read)
        shard = int(rows.row[0]) // R
        order.bad = [BadShard(bad_from, "a", shard)]
        now = {row // R for row in order.at(read).row.tolist()}
        assert (shard not in now) == (read >= bad_from)


@pytest.mark.parametrize(
    "skips", [[Skip(3, 0)], [Skip(-1, 2)], [Skip(3, 1), Skip(3, 1)], [Skip(4, 1), Skip(3, 1)], [Skip(2, -1)]]
)
def test_an_invalid_list_of_skips_is_refused(skips: list[Skip]) -> None:
    with pytest.raises(ValueError):
        order_with([Segment(0, {"a": 1.0}, {"a": (50,)})], 0, skips)


GEOMETRY = {"a": Split(R, (Extent(300, 1, 1),)), "b": Split(R, (Extent(200, 1, 1),))}


def plan(*ask: tuple[int, int]) -> DataState:
    """Return the plan of a run file whose second mixture stage starts at step 8."""
    sources = (SourceConfig("a", "a", 1.0), SourceConfig("b", "b", 0.0))
    skip = tuple(SkipConfig(*one) for one in ask)
    data = DataConfig("t", 10, sources, (MixtureStage(8 * TOKENS, {"b": 1.0}),), skip)
    return planned(data, TOKENS // 10, GEOMETRY)


def resumed(past: DataState, step: int, *ask: tuple[int, int]) -> DataState:
    saved = json.loads(json.dumps(past.as_json()))  # through a checkpoint
    return continued(state_from_json(saved, "ckpt"), plan(*ask), step, "ckpt")


def steps_of(state: DataState) -> list[list[tuple[int, int, int]]]:
    order = state.order(5, BATCH)
    return [as_list(order.at(step)) for step in range(STEPS)]


def test_a_stage_starts_after_its_trained_tokens_despite_skips() -> None:
    for ask in ((), ((3, 2),), ((7, 9),), ((8, 2),), ((0, 30), (9, 1))):
        order = plan(*ask).order(5, BATCH)
        sources = [set(order.at(step).source.tolist()) for step in range(STEPS)]
        assert sources == [{0}] * 8 + [{1}] * (STEPS - 8)
        assert [rows for rows, _ in order.consumed(STEPS).values()] == [8 * BATCH, (STEPS - 8) * BATCH]


@pytest.mark.parametrize("stops", [(), (3,), (4,), (5, 12), (12, 13, 20)])
@pytest.mark.parametrize("ask", [(), ((4, 2),), ((4, 2), (12, 5)), ((0, 1), (8, 3))])
def test_a_run_that_resumes_reads_as_one_that_does_not(ask: Ask, stops: tuple[int, ...]) -> None:
    state = whole = plan(*ask)
    for stop in stops:
        state = resumed(state, stop, *ask)
        assert state == whole
    assert steps_of(state) == steps_of(whole)


@pytest.mark.parametrize("step", [5, 6])
def test_past_skips_stay(step: int) -> None:
    """Past skips stay, even without the override that requested them or with new ones to come."""
    past = plan((4, 2), (20, 3))
    assert resumed(past, step).skips == (Skip(4, 2),)  # future skips come from the run file
    assert resumed(past, step, (4, 2), (6, 1), (25, 1)).skips == (Skip(4, 2), Skip(6, 1), Skip(25, 1))
    assert steps_of(resumed(past, step))[:20] == steps_of(past)[:20]
    assert resumed(plan(), step, (step, 2)).skips == (Skip(step, 2),)
    assert steps_of(resumed(plan(), step, (step, 2)))[:step] == steps_of(plan())[:step]


@pytest.mark.parametrize(
    ("past", "ask", "message"),
    [
        ((), ((4, 2),), "skipped nothing at step 4, where data.skip requests 2; go back there with "
         "checkpoint.rewind_to=4, or skip at step 5 or later"),
        (((4, 2),), ((4, 3),), "skipped 2 steps at step 4, where data.skip requests 3; go back there"),
        (((4, 2),), ((3, 1), (4, 2)), "skipped nothing at step 3, where data.skip requests 1"),
        ((), ((0, 2),), "skipped nothing at step 0, where data.skip requests 2; skip at step 5 or later"),
    ],
)  # fmt: skip
def test_past_skips_that_the_run_did_not_make_are_refused(past: Ask, ask: Ask, message: str) -> None:
    """Otherwise a run would claim that it never read a window that it did read."""
    with pytest.raises(UserError) as caught:
        resumed(plan(*past), 5, *ask)
    assert str(caught.value).startswith("ckpt: is at step 5 and has " + message)


def test_a_checkpoint_without_the_key_has_no_skips() -> None:
    saved = plan().as_json()
    del saved["skips"]
    assert state_from_json(json.loads(json.dumps(saved)), "ckpt") == plan()
    with pytest.raises(UserError, match="ckpt: holds no state of the data"):
        state_from_json({**saved, "skips": [{"at": 3}]}, "ckpt")


def test_a_skip_has_exactly_its_number_of_rows() -> None:
    """The first step after a skip begins exactly at the row after the window."""
    history = [Segment(0, {"a": 1.0}, {"a": (500 * R,)})]
    numbers = [order_with(history, 1, skips).rows(4 * BATCH, 1) for skips in ([], [Skip(4, 2)])]
    positions = [np.flatnonzero(plain_order(history, 1).rows(0, 50 * BATCH).row == n.row[0])[0] for n in numbers]
    assert positions == [4 * BATCH, 6 * BATCH]
