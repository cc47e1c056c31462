"""The consistency checks of the dry run find mismatches between ranks and name the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from llama_ds.data.order import Rows
from llama_ds.layout.axes import Axes, Coords
from llama_ds.layout.layout import Layout
from llama_ds.layout.ranks import choose_ranks, distinct_ranks
from llama_ds.training.dry_run.checks import (
    check_batch,
    check_collectives,
    check_groups,
    check_messages,
    check_progress,
)
from llama_ds.training.dry_run.report import Check, IssuedCall, ProcessGroup, RankReport, axis_of
from llama_ds.training.dry_run.rows import compare_rows

LAYOUT = Layout(pp=2, dp=2, tp=2, micro_batch=1, accumulation=4)
PAIR, OTHER, PIPE = ProcessGroup("1", (0, 1)), ProcessGroup("2", (0, 1)), ProcessGroup("3", (0, 1))


def rank_report(rank: int, *step: IssuedCall, **changes: object) -> RankReport:
    """The report of a rank in the groups PAIR, OTHER and PIPE, which have the indices 0, 1 and 2."""
    coords = LAYOUT.coords(rank)
    report = RankReport(
        rank=rank,
        coords=coords,
        stages=[coords.pp],
        parameters_sharded=10,
        parameters_replicated=1,
        memory={},
        planned={},
        groups=[PAIR, OTHER, PIPE],
        building=[],
        step=list(step),
        new_groups="same",
        micro_batches=4,
        engine_batch=(8, 4, 2),
        reads_data=True,
    )
    return replace(report, **changes)  # type: ignore[arg-type]


def reduce(group: int = 0, size: int = 8) -> IssuedCall:
    return IssuedCall("all_reduce", group, -1, size)


def sent(to: int, size: int) -> IssuedCall:
    return IssuedCall("send", 2, to, size)


def received(source: int, size: int) -> IssuedCall:
    return IssuedCall("receive", 2, source, size)


GOOD = [rank_report(0, reduce(), sent(1, 16), reduce(1)), rank_report(1, received(0, 16), reduce(), reduce(1))]


@pytest.mark.parametrize("check", [check_groups, check_messages, check_collectives, check_progress])
def test_ranks_that_fit_pass(check: Callable[[list[RankReport]], Check]) -> None:
    assert check(GOOD).ok


@pytest.mark.parametrize(
    ("check", "ranks", "words"),
    [
        (check_messages, [rank_report(0, sent(1, 16)), rank_report(1)], "message 1: 16 bytes sent, none received"),
        (check_messages, [rank_report(0), rank_report(1, received(0, 4))], "message 1: none sent, 4 bytes received"),
        (
            check_messages,
            [rank_report(0, sent(1, 8), sent(1, 16)), rank_report(1, received(0, 8), received(0, 8))],
            "rank 0 to rank 1, 2 sends and 2 receives: message 2: 16 bytes sent, 8 bytes received",
        ),
        (
            check_collectives,
            [rank_report(0, reduce(size=8)), rank_report(1, reduce(size=4))],
            "group 1 of ranks 0, 1: collective 1 is all_reduce of 8 bytes on rank 0, all_reduce of 4 bytes on rank 1",
        ),
        (
            check_collectives,
            [rank_report(0, reduce(), reduce()), rank_report(1, reduce())],
            "on rank 0, none on rank 1",
        ),
        (
            check_collectives,
            [rank_report(0, IssuedCall("broadcast", 0, 0, 8)), rank_report(1, IssuedCall("broadcast", 0, 1, 8))],
            "with root 0 on rank 0, broadcast of 8 bytes with root 1",
        ),
        # The order agrees within each group, but each rank first waits in the group that the other enters second.
        (
            check_progress,
            [rank_report(0, reduce(0), reduce(1)), rank_report(1, reduce(1), reduce(0))],
            "2 ranks wait for one another: rank 0 in all_reduce of group 1 (0, 1); rank 1 in all_reduce of group 2",
        ),
        (check_progress, [rank_report(0, reduce()), rank_report(1)], "1 ranks wait"),
        (check_groups, [rank_report(0), rank_report(1, new_groups="other")], "ranks 0 and 1 create different groups"),
        (
            check_groups,
            [rank_report(0), rank_report(1, groups=[ProcessGroup("1", (1, 2))])],
            "group 1 is 0, 1 on rank 0, 1, 2 on rank 1",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    check: Callable[[list[RankReport]], Check], ranks: list[RankReport], words: str
) -> None:
    found = check(ranks)
    assert not found.ok
    assert words in found.text


def test_batch_is_what_ranks_read_and_the_engine_counts() -> None:
    assert check_batch(LAYOUT, GOOD).ok
    assert "reads 3 micro-batches, not 4" in check_batch(LAYOUT, [rank_report(0, micro_batches=3)]).text
    assert "reads 4 micro-batches, not 0" in check_batch(LAYOUT, [rank_report(0, reads_data=False)]).text
    assert "(16, 4, 2)" in check_batch(LAYOUT, [rank_report(0, engine_batch=(16, 4, 2))]).text


def rows(*numbers: int) -> Rows:
    return Rows(np.zeros(len(numbers), int), np.ones(len(numbers), int), np.array(numbers))


def test_rows_that_two_data_parallel_ranks_read_are_named() -> None:
    assert compare_rows([(0, rows(1, 2)), (1, rows(3, 4))], 2).ok
    found = compare_rows([(0, rows(1, 2)), (1, rows(3, 2))], 2)
    assert not found.ok
    assert found.text == "data-parallel ranks 0 and 1 both read row 2 of source 0 in epoch 1"
    assert "reads 1 rows in a step, not 2" in compare_rows([(0, rows(1))], 2).text


def test_distinct_ranks_cover_every_position_and_both_ends_of_each_axis() -> None:
    chosen = [LAYOUT.coords(rank) for rank in distinct_ranks(LAYOUT)]
    corners = [{}, {"tp": 1}, {"dp": 1}]
    assert chosen == [Coords(pp=stage, **corner) for stage in (0, 1) for corner in corners]
    assert choose_ranks("all-distinct,first", Axes(), "--rank") == [0]


def test_groups_are_named_by_what_they_connect() -> None:
    named = {(0, 1): "tp", (0, 2): "dp", (0, 4): "pp", tuple(range(8)): "all", (3,): "self", (0, 3): "mixed"}
    assert {ranks: axis_of(ranks, LAYOUT) for ranks in named} == named
