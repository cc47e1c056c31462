"""Time model of collectives and point-to-point messages, in seconds.

A ring of n ranks sends (n - 1) / n of the bytes in each half of an all-reduce: the reduce-scatter and the all-gather.
Ranks are numbered as in `llama_ds.layout.axes`, so a group is defined by a stride and a size. A group over several
nodes shares its nodes' links with the parallel groups. Measured times in the machine's description take precedence.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_ds.layout.chunk_order import passed_before
from llama_ds.perf.plan.curves import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, SEND
from llama_ds.perf.plan.hardware import Hardware

# Share of a ring over a whole node in which data is copied within the GPUs, whatever the number of ranks. The other 78%
# are proportional to what the ring sends, (n - 1) / n of the data. All-reduces of 1 GiB over 2 to 8 A100s
# (docs/calibration/nccl_allreduce_a100_nvlink.csv) take 1.65 s/TB and 3.42 s/TB of sent data (293 GB/s), within 1.4%.
_COPYING = 0.217


@dataclass(frozen=True)
class RankGroup:
    """Ranks at equal distances. All ranks of the job communicate at the same time, in groups of this kind."""

    size: int
    stride: int = 1


def ranks_per_node(gpu: Hardware, group: RankGroup) -> int:
    """Return the number of the group's ranks on one node."""
    return max(1, min(group.size, gpu.links.gpus_per_node // group.stride))


def nodes(gpu: Hardware, group: RankGroup) -> int:
    """Return the number of nodes that the group spans."""
    return -(-group.size // ranks_per_node(gpu, group))


def bus_bandwidth(gpu: Hardware, group: RankGroup) -> float:
    """Return the bandwidth of a ring over the group, in bytes/s."""
    within = gpu.links.nvlink_gb_s * 1e9
    here = ranks_per_node(gpu, group)
    if here >= group.size:
        return within
    share, ring = here / gpu.links.gpus_per_node, gpu.links.ring_gb_s
    return min(within, gpu.network * share, ring * 1e9 if ring else within)


def ring_latency(gpu: Hardware, group: RankGroup) -> float:
    """Return the latency of one ring pass of an empty message: n - 1 hops, of which one per node crosses nodes."""
    here, many, links = ranks_per_node(gpu, group), nodes(gpu, group), gpu.links
    start = links.nvlink_latency_us / 2 if here > 1 else 0.0
    return (start + links.nvlink_hop_us * many * (here - 1) + links.network_latency_us * (many - 1)) * 1e-6


def tree_latency(gpu: Hardware, group: RankGroup) -> float:
    """Return the latency up and down a tree of nodes, as NCCL reduces small tensors over many nodes."""
    here, many, links = ranks_per_node(gpu, group), nodes(gpu, group), gpu.links
    start = links.nvlink_latency_us if here > 1 else 0.0
    up = links.nvlink_hop_us * (here - 1) + links.network_latency_us * (many - 1).bit_length()
    return (start + 2 * up) * 1e-6


def all_reduce(gpu: Hardware, group: RankGroup, size: float) -> float:
    """Return the time of an all-reduce of `size` bytes."""
    measured = _measured(gpu, ALL_REDUCE, group, size)
    if measured is not None:
        return measured
    wait = min(2 * ring_latency(gpu, group), tree_latency(gpu, group))
    return 2 * _wire(gpu, group, size) + wait if group.size > 1 and size > 0 else 0.0


def all_gather(gpu: Hardware, group: RankGroup, size: float, shared_links: int = 1) -> float:
    """Return the time of an all-gather with a result of `size` bytes; `shared_links` as in `Program`."""
    measured = _measured(gpu, ALL_GATHER, group, size)
    return half(gpu, group, size, shared_links) if measured is None else measured


def reduce_scatter(gpu: Hardware, group: RankGroup, size: float, shared_links: int = 1) -> float:
    """Return the time of a reduce-scatter with an input of `size` bytes; `shared_links` as in `Program`."""
    measured = _measured(gpu, REDUCE_SCATTER, group, size)
    return half(gpu, group, size, shared_links) if measured is None else measured


def exchange(gpu: Hardware, group: RankGroup, size: float) -> float:
    """Return the time in which each rank sends every other one its part of `size` bytes (all-to-all).

    Unlike in a ring, each rank's own parts for other nodes leave its node, by its share of the node's links.
    """
    if group.size <= 1 or size <= 0:
        return 0.0
    within, here = gpu.links.nvlink_gb_s * 1e9, ranks_per_node(gpu, group)
    outside = min(within, gpu.network / gpu.links.gpus_per_node)
    sent = (here - 1) / within + (group.size - here) / outside
    return sent * size / group.size + ring_latency(gpu, group)


def layer_sum(gpu: Hardware, group: RankGroup, size: float) -> float:
    """Return the time of a layer's all-reduce over a ring: a reduce-scatter and an all-gather."""
    measured = _measured(gpu, ALL_REDUCE, group, size)
    return 2 * half(gpu, group, size) if measured is None else measured


def half(gpu: Hardware, group: RankGroup, size: float, shared_links: int = 1) -> float:
    """Return the time of a ring's reduce-scatter or all-gather of `size` bytes in total."""
    if group.size <= 1 or size <= 0:
        return 0.0
    links = shared_links if nodes(gpu, group) > 1 else 1
    return links * _wire(gpu, group, size) + ring_latency(gpu, group)


def contention(gpu: Hardware, group: RankGroup) -> float:
    """Return the compute time that a second of hidden communication in the group costs.

    Half of it are the processors that the collective occupies, at any rate; the other half is its copying, which the
    network may slow down. A measured cost is used as it is, and on a CPU it does not depend on the rate.
    """
    if gpu.host_computes or (gpu.curves and gpu.curves.collectives):
        return gpu.calibration.contention
    return gpu.calibration.contention * (1 + bus_bandwidth(gpu, group) / (gpu.links.nvlink_gb_s * 1e9)) / 2


def exposed_by_chunks(
    count: int, before: float, reduce: float, gather: float, after: float, early: bool = True, ends: bool = False
) -> float:
    """Return for how long products wait for the collectives between them, in the order of `layout/chunk_order.py`.

    Args:
        before, reduce, gather, after: time of one chunk's product, its sum, its gather and the product behind that; 0:
            there is none. The link carries one collective at a time, as issued.
        ends: whether all chunks are passed on before the first product behind, as from layer to layer.
    """
    now, link = 0.0, 0.0  # times until which the rank computes and the link is occupied
    sums, gathers = list[float](), list[float]()
    for i, until in enumerate(passed_before(count, early)):
        for number in range(len(gathers), count if ends and i == count else until):
            now = max(now, sums[number])
            link = max(link, now) + gather if gather else link
            gathers.append(link if gather else now)
        if i < count:
            now += before
            link = max(link, now) + reduce if reduce else link
            sums.append(link if reduce else now)
        else:
            now = max(now, gathers[i - count]) + after
    return now - count * (before + after)


def _measured(gpu: Hardware, operation: str, group: RankGroup, size: float) -> float | None:
    """Return the measured time of an operation, or None if groups of this kind were not measured."""
    if group.size <= 1 or size <= 0 or not gpu.curves:
        return None
    found = gpu.curves.collective(operation, ranks_per_node(gpu, group), nodes(gpu, group))
    return found.seconds(size) if found else None


def _wire(gpu: Hardware, group: RankGroup, size: float) -> float:
    share = (group.size - 1) / group.size
    if ranks_per_node(gpu, group) >= group.size:
        node = gpu.links.gpus_per_node
        share = (1 - _COPYING) * share + _COPYING * (node - 1) / node
    return share * size / bus_bandwidth(gpu, group)


def message(gpu: Hardware, stride: int, size: float, ranks: int) -> tuple[float, float]:
    """Return (time on the link, latency) of a message to the rank at distance `stride`; all `ranks` send one.

    Messages that cross nodes share the node's links with those of all its ranks whose partner is on another node.
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
