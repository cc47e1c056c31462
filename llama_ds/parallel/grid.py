"""Process groups of a layout: DeepSpeed's grid, and this rank's tensor- and context-parallel communicators."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

from llama_ds.config.context_parallel import CpSizes
from llama_ds.layout.axes import AXES, Coords
from llama_ds.layout.layout import Layout
from llama_ds.model.context_parallel import ContextParallel, WholeRows
from llama_ds.model.tensor_parallel import SingleRank, TensorParallel
from llama_ds.parallel.context_parallel import CpGroups, GroupContextParallel
from llama_ds.parallel.tensor_parallel import GroupTensorParallel
from llama_ds.parallel.trace import Trace


def topology(layout: Layout) -> PipeModelDataParallelTopology:
    """Return DeepSpeed's topology for the layout; its rank order is that of `llama_ds.layout.axes`.

    DeepSpeed knows three axes: all axes between pp and tp are its data axis, over which it reduces gradients.
    """
    return PipeModelDataParallelTopology(num_pp=layout.pp, num_mp=layout.tp, num_dp=layout.data_axis)


def grid(layout: Layout) -> PipelineParallelGrid:
    """Return the process groups that DeepSpeed's engine needs without a pipeline. Collective."""
    return PipelineParallelGrid(topology=topology(layout))


def stage_group(layout: Layout) -> dist.ProcessGroup | None:
    """Return the group of the ranks of this rank's pipeline stage, None if that is one rank. Collective."""
    return None if layout.stride("pp") == 1 else _own_group(layout, *AXES[AXES.index("pp") + 1 :])


def tensor_parallel(layout: Layout, sequence_parallel: bool, trace: Trace, chunks: int = 1) -> TensorParallel:
    """Return this rank's tensor-parallel communicator, with collectives recorded by `trace`. Collective.

    `chunks` is `parallel.tp_chunks`.
    """
    if layout.tp == 1:
        return SingleRank()
    return GroupTensorParallel(_own_group(layout, "tp"), sequence_parallel, trace, chunks)


def context_parallel(layout: Layout, sizes: CpSizes, trace: Trace) -> ContextParallel:
    """Return this rank's context-parallel communicator, with its messages recorded by `trace`. Collective."""
    if layout.cp == 1:
        return WholeRows()
    whole, inner = layout.groups("cp"), sizes.all_to_all
    groups = [ranks[at : at + inner] for ranks in whole for at in range(0, layout.cp, inner)]
    rings = [ranks[at::inner] for ranks in whole for at in range(inner)]
    own = CpGroups(*(_own_of(parts) for parts in (whole, rings, groups)))
    return GroupContextParallel(own, sizes, trace)


def neighbour_groups(layout: Layout, neighbours: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Return this rank's group of `neighbours` along `layout.data_axis`, and that of its peers in others. Collective.

    Together they have the ranks that reduce gradients: the n-th of these is number n % neighbours of its group, which
    is the peers' number n // neighbours.
    """
    whole = layout.groups("dp", "cp")
    near = [ranks[at : at + neighbours] for ranks in whole for at in range(0, len(ranks), neighbours)]
    far = [ranks[at::neighbours] for ranks in whole for at in range(neighbours)]
    return _own_of(near), _own_of(far)


def own_coords(layout: Layout) -> Coords:
    """Return this rank's coordinates."""
    return layout.coords(dist.get_rank())


def own_data_rank(layout: Layout) -> int:
    """Return this rank's number along `layout.data_axis`."""
    return layout.stage_places[layout.rank_in_stage(dist.get_rank())][0]


def _own_group(layout: Layout, *axes: str) -> dist.ProcessGroup:
    """Make all groups along `axes`, and return that of this rank. Collective."""
    return _own_of(layout.groups(*axes))


def _own_of(groups: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """Make all `groups` of ranks, and return that of this rank. Collective."""
    rank, own = dist.get_rank(), None
    for ranks in groups:
        group = dist.new_group(list(ranks))
        own = group if rank in ranks else own
    assert own is not None
    return own
