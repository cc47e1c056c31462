"""Seconds that collectives and messages take.

A ring of n ranks sends (n - 1) / n of the bytes in each of the two halves of an all-reduce (reduce-scatter,
all-gather). Ranks lie as `llama_ds.layout.axes` numbers them, so a group is a stride and a size. A group over several
nodes shares its nodes' links with the groups beside it. Where the machine's description holds times of an operation
among such ranks, those count.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_ds.perf.plan.curves import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, SEND
from llama_ds.perf.plan.hardware import Hardware


@dataclass(frozen=True)
class RankGroup:
    """Ranks at equal distances, while all ranks of the job communicate in groups like it."""

    size: int
    stride: int = 1


def ranks_per_node(gpu: Hardware, group: RankGroup) -> int:
    """Return how many of the group's ranks are on one node."""
    return max(1, min(group.size, gpu.links.gpus_per_node // group.stride))


def nodes(gpu: Hardware, group: RankGroup) -> int:
    """Return over how many nodes the group lies."""
    return -(-group.size // ranks_per_node(gpu, group))


def bus_bandwidth(gpu: Hardware, group: RankGroup) -> float:
    """Return the bytes a second of a ring over the group."""
    within = gpu.links.nvlink_gb_s * 1e9
    here = ranks_per_node(gpu, group)
    if here >= group.size:
        return within
    share = here / gpu.links.gpus_per_node
    return min(within, gpu.network * share)


def ring_latency(gpu: Hardware, group: RankGroup) -> float:
    """Return the time in which nothing goes once round the ring: n - 1 hops, one between nodes for each node."""
    here, many, links = ranks_per_node(gpu, group), nodes(gpu, group), gpu.links
    start = links.nvlink_latency_us / 2 if here > 1 else 0.0
    return (start + links.nvlink_hop_us * many * (here - 1) + links.network_latency_us * (many - 1)) * 1e-6


def tree_latency(gpu: Hardware, group: RankGroup) -> float:
    """Return the same up and down a tree of nodes, as NCCL sums small tensors over many."""
    here, many, links = ranks_per_node(gpu, group), nodes(gpu, group), gpu.links
    start = links.nvlink_latency_us if here > 1 else 0.0
    up = links.nvlink_hop_us * (here - 1) + links.network_latency_us * (many - 1).bit_length()
    return (start + 2 * up) * 1e-6


def all_reduce(gpu: Hardware, group: RankGroup, size: float) -> float:
    """Return the time to sum `size` bytes over the group."""
    measured = _measured(gpu, ALL_REDUCE, group, size)
    if measured is not None:
        return measured
    wait = min(2 * ring_latency(gpu, group), tree_latency(gpu, group))
    return 2 * _wire(gpu, group, size) + wait if group.size > 1 and size > 0 else 0.0


def all_gather(gpu: Hardware, group: RankGroup, size: float) -> float:
    """Return the time to gather `size` bytes, of which each rank has a part."""
    measured = _measured(gpu, ALL_GATHER, group, size)
    return half(gpu, group, size) if measured is None else measured


def reduce_scatter(gpu: Hardware, group: RankGroup, size: float) -> float:
    """Return the time to sum `size` bytes over the group, each rank keeping a part."""
    measured = _measured(gpu, REDUCE_SCATTER, group, size)
    return half(gpu, group, size) if measured is None else measured


def layer_sum(gpu: Hardware, group: RankGroup, size: float) -> float:
    """Return the time of a layer's all-reduce: a reduce-scatter and an all-gather, if no tree is asked for."""
    measured = _measured(gpu, ALL_REDUCE, group, size)
    return 2 * half(gpu, group, size) if measured is None else measured


def half(gpu: Hardware, group: RankGroup, size: float) -> float:
    """Return the time of a ring's reduce-scatter or all-gather whose whole is `size` bytes."""
    return _wire(gpu, group, size) + ring_latency(gpu, group) if group.size > 1 and size > 0 else 0.0


def _measured(gpu: Hardware, operation: str, group: RankGroup, size: float) -> float | None:
    """Return the time of an operation by the machine's measurements; None where there are none of such groups."""
    if group.size <= 1 or size <= 0 or not gpu.curves:
        return None
    found = gpu.curves.collective(operation, ranks_per_node(gpu, group), nodes(gpu, group))
    return found.seconds(size) if found else None


def _wire(gpu: Hardware, group: RankGroup, size: float) -> float:
    return (group.size - 1) / group.size * size / bus_bandwidth(gpu, group)


def message(gpu: Hardware, stride: int, size: float, ranks: int) -> tuple[float, float]:
    """Return (time on the link, latency) of a message to the rank `stride` further, all of `ranks` sending one.

    Of messages that cross nodes, as many share the links as the node has ranks whose partner is elsewhere.
    """
    per_node = gpu.links.gpus_per_node
    inside = 1.0 if ranks <= per_node else max(0.0, 1 - stride / per_node)
    near = gpu.curves.collective(SEND, 2, 1) if gpu.curves else None
    far = gpu.curves.collective(SEND, 1, 2) if gpu.curves else None
    if (near or not inside) and (far or inside == 1) and (near or far):
        return sum(share * c.seconds(size) for share, c in ((inside, near), (1 - inside, far)) if c), 0.0
    link = gpu.links.nvlink_gb_s * 1e9
    crossing = min(per_node, stride)
    outside = gpu.network / crossing if inside < 1 else link
    time = inside * size / link + (1 - inside) * size / min(link, outside)
    wait = inside * gpu.links.nvlink_latency_us + (1 - inside) * gpu.links.network_latency_us
    return time, wait * 1e-6
