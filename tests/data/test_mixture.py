"""The data state of a run is its step and history: resuming any number of times does not change the rows it reads."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ds.config.schema import DataConfig, MixtureStage, SourceConfig
from llama_ds.data.mixture import LISTED, DataState, continued, planned, state_from_json
from llama_ds.data.order import BadShard, Order
from llama_ds.data.source.manifest import Extent, Split
from llama_ds.errors import UserError

BATCH, TOKENS, STEPS, R = 24, 24 * 10, 60, 5  # rows and tokens per step, steps, rows per shard

Geometry = dict[str, Split]


def split(*rows: int, bad: tuple[int, ...] = ()) -> Split:
    return Split(R, tuple(Extent(r, 1, 1) for r in rows), bad)


@st.composite
def runs(draw: st.DrawFn) -> tuple[DataConfig, Geometry]:
    names = [f"s{i}" for i in range(draw(st.integers(1, 4)))]

    def weights() -> dict[str, float]:
        some = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        parts = [draw(st.integers(1, 9)) for _ in some]
        return {name: part / sum(parts) for name, part in zip(some, parts, strict=True)}

    first = weights()
    ends = sorted(draw(st.sets(st.integers(1, STEPS * TOKENS - 1), max_size=3)))
    ends = [e for i, e in enumerate(ends) if not i or -(-e // TOKENS) > -(-ends[i - 1] // TOKENS)]
    stages = tuple(MixtureStage(end, weights()) for end in ends)
    read = sorted({*first, *(name for stage in stages for name in stage.weights)})
    sources = tuple(SourceConfig(name, name, first.get(name, 0.0)) for name in read)
    geometry = {name: split(draw(st.integers(1, 200))) for name in read}
    return DataConfig("t.model", 10, sources, stages), geometry


def order_of(state: DataState, seed: int) -> Order:
    return Order(seed, BATCH, state.rows_per_shard, state.segments, state.bad)


def rows_of(order: Order, step: int, dp: int = 1) -> list[tuple[str, int, int]]:
    """Return the rows that all data-parallel ranks together read in a step."""
    ranks = [order.at(step, rank, dp) for rank in range(dp)]
    columns = [np.concatenate(column) for column in zip(*ranks, strict=True)]
    return [(order.names[s], int(e), int(r)) for s, e, r in zip(*columns, strict=True)]


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(run=runs(), seed=st.integers(0, 2**40), stops=st.sets(st.integers(1, STEPS - 1), max_size=3))
def test_a_run_that_resumes_under_any_layout_reads_as_one_that_does_not(
    run: tuple[DataConfig, Geometry], seed: int, stops: set[int]
) -> None:
    data, geometry = run
    whole = planned(data, BATCH, geometry)
    uninterrupted, state, first = order_of(whole, seed), whole, 0
    layouts = iter((3, 2, 8, 1))
    for stop in [*sorted(stops), STEPS]:
        order, dp = order_of(state, seed), next(layouts)
        for step in range(first, stop):
            assert rows_of(order, step, dp) == rows_of(uninterrupted, step)
        saved = json.loads(json.dumps(state.as_json()))  # through a checkpoint
        state, first = continued(state_from_json(saved, "x"), planned(data, BATCH, geometry), stop, "x"), stop
        assert state == whole


@settings(deadline=None, max_examples=20)
@given(run=runs(), seed=st.integers(0, 99), at=st.integers(1, STEPS - 1), more=st.integers(1, 80), new=st.booleans())
def test_shards_or_sources_added_in_mid_run_change_no_earlier_step(
    run: tuple[DataConfig, Geometry], seed: int, at: int, more: int, new: bool
) -> None:
    data, geometry = run
    before = planned(data, BATCH, geometry)
    first, *_ = geometry
    grown = {**geometry, first: split(geometry[first].rows, more)}
    if new:  # first in the run file: the order of its sources must not affect the past
        halved = [replace(source, weight=source.weight / 2) for source in data.sources]
        data = replace(data, sources=(SourceConfig("new", "new", 0.5), *halved))
        grown = {"new": split(40), **grown}
    after = continued(before, planned(data, BATCH, grown), at, "x")
    orders = order_of(before, seed), order_of(after, seed)
    for step in range(at):
        assert rows_of(orders[0], step) == rows_of(orders[1], step)
    again = continued(after, planned(data, BATCH, grown), min(at + 7, STEPS - 1), "x")
    for step in range(STEPS):
        assert rows_of(orders[1], step) == rows_of(order_of(again, seed), step)


def test_a_stage_begins_when_its_tokens_are_read() -> None:
    sources = (SourceConfig("a", "a", 1.0), SourceConfig("b", "b", 0.0))
    for tokens, step in ((1, 1), (TOKENS, 1), (TOKENS + 1, 2), (7 * TOKENS - 1, 7)):
        data = DataConfig("t", 10, sources, (MixtureStage(tokens, {"b": 1.0}),))
        order = order_of(planned(data, BATCH, {"a": split(50), "b": split(50)}), 0)
        assert {name for name, _, _ in rows_of(order, step - 1)} == {"a"}
        assert {name for name, _, _ in rows_of(order, step)} == {"b"}


def test_listed_damage_counts_from_the_step_that_first_sees_it() -> None:
    data = DataConfig("t", 10, (SourceConfig("a", "a", 1.0),))
    start = planned(data, BATCH, {"a": split(50, bad=(2,))})
    assert start.bad == (BadShard(0, "a", 2, LISTED),)
    found = DataState(start.rows_per_shard, start.segments, (*start.bad, BadShard(5, "a", 3, "checksum", 9)))
    resumed = continued(found, planned(data, BATCH, {"a": split(50, bad=(2, 4))}), 20, "x")
    assert resumed.bad == (*found.bad, BadShard(20, "a", 4, LISTED))
    repaired = continued(found, planned(data, BATCH, {"a": split(50)}), 20, "x")
    assert repaired.bad == found.bad  # shards replaced in the past stay replaced


@pytest.mark.parametrize("now", [split(49), split(20, 30), split(51), Split(R + 1, (Extent(50, 1, 1),))])
def test_a_source_that_was_rebuilt_is_refused(now: Split) -> None:
    data = DataConfig("t", 10, (SourceConfig("a", "a", 1.0),))
    past = planned(data, BATCH, {"a": split(50)})
    with pytest.raises(UserError, match=r"ckpt: has read source a of 50 rows, 5 in a shard, .* it was rebuilt"):
        continued(past, planned(data, BATCH, {"a": now}), 20, "ckpt")


def test_a_removed_source_is_not_read_after_the_resume() -> None:
    two = DataConfig("t", 10, (SourceConfig("a", "a", 0.5), SourceConfig("b", "b", 0.5)))
    one = replace(two, sources=(SourceConfig("b", "b", 1.0),))
    past = planned(two, BATCH, {"a": split(50), "b": split(50)})
    state = continued(past, planned(one, BATCH, {"b": split(50)}), 10, "x")
    order = order_of(state, 0)
    assert rows_of(order, 9) == rows_of(order_of(past, 0), 9)
    assert {name for name, _, _ in rows_of(order, 10)} == {"b"}
    assert order.consumed(20)["a"] == order.consumed(10)["a"]


def test_a_renamed_source_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise it would start again at its first row, and the run would read those rows twice."""

    def of(*digests: str) -> Split:
        return Split(R, tuple(Extent(50, 1, 1, digest) for digest in digests))

    def plan(**sources: Split) -> DataState:
        weights = tuple(SourceConfig(name, name, 1 / len(sources)) for name in sources)
        return planned(DataConfig("t", 10, weights), BATCH, sources)

    past = plan(a=of("1"), b=of("2"))
    for now, listed in (
        (plan(c=of("1"), b=of("2")), "a, which the run file no longer lists,"),
        (plan(c=of("3", "1"), b=of("2")), "a, which the run file no longer lists,"),
        (plan(c=of("1"), a=of("1"), b=of("2")), "a so"),
    ):
        with pytest.raises(UserError, match=rf"^ckpt: source c is new .* that it has read as source {listed}"):
            continued(past, now, 20, "ckpt")
        assert "c" in continued(past, now, 20, "ckpt", reread=["c"]).rows_per_shard
    with caplog.at_level("INFO", "llama_ds"):
        state = continued(past, plan(c=of("3"), b=of("2")), 20, "ckpt")
    assert "source c is new to the run: its first row comes next" in caplog.messages
    again = continued(state, plan(a=of("1"), b=of("2")), 40, "ckpt")  # a comes back where it ended
    assert again.order(0, BATCH).consumed(41)["a"] > again.order(0, BATCH).consumed(20)["a"]


def test_a_new_source_beside_a_lost_one_without_digests_is_logged_as_unsure(caplog: pytest.LogCaptureFixture) -> None:
    data = DataConfig("t", 10, (SourceConfig("a", "a", 1.0),))
    past = planned(data, BATCH, {"a": split(50)})
    now = planned(replace(data, sources=(SourceConfig("c", "c", 1.0),)), BATCH, {"c": split(50)})
    with caplog.at_level("INFO", "llama_ds"):
        continued(past, now, 20, "ckpt")
    assert "; ckpt records no digest of a: check that it is not one of these" in caplog.messages[0]
