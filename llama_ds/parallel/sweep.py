"""Times collectives and messages by size over all ranks of a job, for every kind of group that a layout may have.

A kind is (ranks per node, nodes). All ranks run in groups of the kind at once, as in a step. The groups are those of
DeepSpeed's topology: neighbours on a node, or slots at equal distances on neighbouring nodes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ds.parallel import messages, world
from llama_ds.parallel.tensor_parallel import all_gather_flat, reduce_scatter_flat

Kind = tuple[int, int]  # ranks per node, nodes
Report = Callable[[str], None]
BLOCKS = 5  # a time is the median of this many means
SEND = "send"


@dataclass(frozen=True)
class SweepResult:
    """Seconds of one operation at each size, in bytes of the whole tensor."""

    operation: str
    ranks: int  # ranks per node
    nodes: int
    sizes: list[int]
    seconds: list[float]


def kinds(nodes: int, slots: int) -> list[Kind]:
    """Return the kinds of groups among `nodes` nodes of `slots` ranks: powers of two of both, and all."""
    on_node, over = _counts(slots), _counts(nodes)
    return [(r, n) for n in over for r in on_node if r * n > 1]


def members(rank: int, slots: int, kind: Kind) -> list[int]:
    """Return the ranks of `rank`'s group of that kind, in order."""
    ranks, nodes = kind
    node, slot = divmod(rank, slots)
    if nodes == 1:
        first = node * slots + slot // ranks * ranks
        return list(range(first, first + ranks))
    stride = slots // ranks
    first_node = node // nodes * nodes
    return [(first_node + n) * slots + slot % stride + r * stride for n in range(nodes) for r in range(ranks)]


def sweep(
    operations: Sequence[str], slots: int, sizes: Sequence[int], seconds: float, device: torch.device, report: Report
) -> list[SweepResult]:
    """Time `operations` in every kind of group, spending about `seconds` on each size. Collective."""
    found = []
    rank, nodes = dist.get_rank(), dist.get_world_size() // slots
    for kind in kinds(nodes, slots):
        own = members(rank, slots, kind)
        group = dist.new_group(own, use_local_synchronization=True)
        for operation in operations:
            if operation == SEND and kind[0] * kind[1] != 2:
                continue
            report(f"{operation} among {kind[0]} ranks on each of {kind[1]} nodes")
            times = []
            for size in sizes:
                part = torch.zeros(max(1, size // 4 // len(own)), device=device)
                whole = torch.zeros(len(part) * len(own), device=device)
                call = partial(CALLS[operation], whole, part, own, group)
                times.append(_time(call, seconds, device))
            if operation == SEND:
                times = [there_and_back / 2 for there_and_back in times]
            found.append(SweepResult(operation, *kind, list(sizes), times))
        dist.destroy_process_group(group)
    return found


def contention(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the slowdown of matrix products per second of concurrent all-reduce, from 0 to 1. Collective."""
    data = torch.ones(size // 4, device=device)
    width = 512 if device.type == "cpu" else 4096
    a = torch.randn(width, width, device=device).to(dtype)
    send = _repeated(lambda: dist.all_reduce(data), device)
    product = _repeated(lambda: torch.mm(a, a), device)
    count = max(1, round(send / product))

    def both() -> None:
        work = dist.all_reduce(data, async_op=True)
        for _ in range(count):
            torch.mm(a, a)
        work.wait()

    together, alone = _repeated(both, device), count * product
    found = (together - max(send, alone)) / min(send, alone)
    return min(1.0, max(0.01, world.maximum([found], device)[0]))


def _counts(total: int) -> list[int]:
    """Return the powers of two that divide `total`, and `total`."""
    return sorted({total, *(1 << i for i in range(total.bit_length()) if total % (1 << i) == 0)})


def _all_reduce(data: Tensor, part: Tensor, own: list[int], group: dist.ProcessGroup | None) -> None:
    dist.all_reduce(data, group=group)


def _all_gather(data: Tensor, part: Tensor, own: list[int], group: dist.ProcessGroup | None) -> None:
    all_gather_flat(data, part, group=group)


def _reduce_scatter(data: Tensor, part: Tensor, own: list[int], group: dist.ProcessGroup | None) -> None:
    reduce_scatter_flat(part, data, group=group)


def _ping_pong(data: Tensor, part: Tensor, own: list[int], group: dist.ProcessGroup | None) -> None:
    """Send a message back and forth."""
    first, second = own
    if dist.get_rank() == first:
        messages.send(data, second, group).wait()
        messages.receive(data, second, group).wait()
    else:
        messages.receive(data, first, group).wait()
        messages.send(data, first, group).wait()


# Functions by operation; arguments: full tensor, this rank's part of it, ranks of the group, group.
CALLS: dict[str, Callable[[Tensor, Tensor, list[int], dist.ProcessGroup | None], None]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    SEND: _ping_pong,
}


def _time(call: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Return the time of a call on the slowest rank. Collective."""
    call()
    one = world.maximum([_mean(call, 1, device)], device)[0]
    count = max(1, min(200, int(seconds / max(one, 1e-6) / BLOCKS)))
    means = []
    for _ in range(BLOCKS):
        world.barrier()
        means.append(_mean(call, count, device))
    return world.maximum([statistics.median(means)], device)[0]


def _repeated(call: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call. Collective."""
    call()
    times = []
    for _ in range(2 * BLOCKS):
        world.barrier()
        times.append(_mean(call, 1, device))
    return statistics.median(times)


def _mean(call: Callable[[], object], count: int, device: torch.device) -> float:
    world.finish(device)
    begin = time.perf_counter()
    for _ in range(count):
        call()
    world.finish(device)
    return (time.perf_counter() - begin) / count
