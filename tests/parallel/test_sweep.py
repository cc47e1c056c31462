"""Collectives are measured in groups with the same placement as in DeepSpeed's topology of a layout."""

from __future__ import annotations

import pytest
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from llama_ds.parallel.sweep import kinds, members
from llama_ds.perf.plan import hardware
from llama_ds.perf.plan.communication import RankGroup, nodes, ranks_per_node


def test_kinds_are_powers_of_two_and_all() -> None:
    assert kinds(1, 2) == [(2, 1)]
    assert kinds(3, 2) == [(2, 1), (1, 3), (2, 3)]
    assert kinds(4, 8) == [(2, 1), (4, 1), (8, 1), *((r, n) for n in (2, 4) for r in (1, 2, 4, 8))]


@pytest.mark.parametrize("tp, dp, pp", [(2, 4, 4), (4, 2, 4), (8, 4, 1), (1, 32, 1), (2, 16, 1)])
def test_groups_of_a_layout_are_measured_groups(tp: int, dp: int, pp: int) -> None:
    """On 4 nodes of 8 slots: every tensor- and data-parallel group, and the planner looks it up as that kind."""
    topology = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=dp)
    machine = hardware.load("a100-80gb")
    for axis, size, stride in (("model", tp, 1), ("data", dp, tp)):
        if size == 1:
            continue
        group = RankGroup(size, stride)
        kind = (ranks_per_node(machine, group), nodes(machine, group))
        assert kind in kinds(4, 8)
        for ranks in topology.get_axis_comm_lists(axis):
            measured = members(ranks[0], 8, kind)
            # A group within a node may be strided in a layout: there every slot is as near as the next.
            assert measured == ranks or (kind[1] == 1 and stride > 1)


def test_every_rank_is_in_one_group_of_a_kind() -> None:
    for kind in kinds(4, 8):
        groups = {tuple(members(rank, 8, kind)) for rank in range(32)}
        assert sorted(rank for group in groups for rank in group) == list(range(32))
        assert all(len(group) == kind[0] * kind[1] for group in groups)
        assert all(rank in members(rank, 8, kind) for rank in range(32))
