"""One rank: `python -m llama_ds.benchmarks.context.rank REQUEST.json FOLDER`, with RANK etc. set."""

from __future__ import annotations

import json
import time
from collections import defaultdict

import torch
from torch import Tensor

from llama_ds.benchmarks.context.request import ContextRequest
from llama_ds.benchmarks.ranks import joined
from llama_ds.config.context_parallel import CpSizes
from llama_ds.layout.axes import Axes
from llama_ds.layout.layout import Layout
from llama_ds.model.shared_rows import kernel_over
from llama_ds.model.tensor_parallel import Pending
from llama_ds.parallel import world
from llama_ds.parallel.context_parallel import CpGroups, GroupContextParallel
from llama_ds.parallel.grid import context_parallel
from llama_ds.parallel.trace import Trace

WARMUP = 1  # untimed turns


class TimedContextParallel(GroupContextParallel):
    """The communicator of a rank, which sums the seconds for which the rank waits for messages.

    A silent one sends nothing, and returns what it was given: what remains is the time of the computation.
    """

    def __init__(self, groups: CpGroups, sizes: CpSizes) -> None:
        super().__init__(groups, sizes)
        self.waited, self.silent = 0.0, False

    def start_pass(self, x: Tensor) -> Pending:
        if self.silent:
            return lambda: x
        pending = super().start_pass(x)

        def wait() -> Tensor:
            start = time.perf_counter()
            received = pending()
            self.waited += time.perf_counter() - start
            return received

        return wait

    def all_to_all(self, x: Tensor) -> Tensor:
        if self.silent:
            return x.contiguous()
        start = time.perf_counter()
        received = super().all_to_all(x)
        self.waited += time.perf_counter() - start
        return received


def main() -> None:
    """Time forward and backward of attention by each method in turns; rank 0 writes times.json."""
    with joined(ContextRequest) as (request, folder, rank):
        own = {name: _communicator(request, sizes) for name, sizes in request.methods.items()}
        found = {str(tokens): _times(request, own, tokens) for tokens in request.seq_lens}
        if rank == 0:
            (folder / "times.json").write_text(json.dumps(found))


def _communicator(request: ContextRequest, sizes: CpSizes) -> TimedContextParallel:
    axes = Axes(cp=request.ranks)
    made = context_parallel(Layout(**axes.sizes._asdict(), micro_batch=1, accumulation=1), sizes, Trace(_CPU))
    assert isinstance(made, GroupContextParallel)
    return TimedContextParallel(made.groups, sizes)


def _times(
    request: ContextRequest, methods: dict[str, TimedContextParallel], tokens: int
) -> dict[str, dict[str, list[float]]]:
    """Return lists with a number of each turn for each method, in seconds.

    They are the whole turn on the slowest rank, what the ranks waited for messages on average, and forward and backward
    of a silent turn on the slowest rank. Methods alternate, so that a change in the machine's speed affects them alike.
    """
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in methods}
    for turn in range(WARMUP + request.repeats):
        for name, cp in methods.items():
            cp.silent = True
            forward, backward = world.maximum(list(_turn(request, cp, tokens)), _CPU)
            cp.silent, cp.waited = False, 0.0
            seconds = world.maximum([sum(_turn(request, cp, tokens))], _CPU)[0]
            waited = world.total([cp.waited], _CPU)[0] / request.ranks
            if turn >= WARMUP:
                for key, value in (
                    ("seconds", seconds), ("waited", waited), ("forward", forward), ("backward", backward)
                ):  # fmt: skip
                    found[name][key].append(value)
    return found


def _turn(request: ContextRequest, cp: TimedContextParallel, tokens: int) -> tuple[float, float]:
    """Return the seconds of forward and backward on this rank."""
    generator = torch.Generator().manual_seed(cp.rank)
    q, grad, k, v = (
        torch.randn(1, tokens // cp.size, heads, request.head_dim, generator=generator)
        for heads in (request.heads, request.heads, request.kv_heads, request.kv_heads)
    )
    kernel = kernel_over(cp, "sdpa")
    world.barrier()
    start = time.perf_counter()
    out, statistics = kernel.forward(q, k, v, None)
    middle = time.perf_counter()
    kernel.backward(grad, q, k, v, out, statistics, None)
    return middle - start, time.perf_counter() - middle


_CPU = torch.device("cpu")

if __name__ == "__main__":
    main()
