"""One rank: `python -m llama_ds.benchmarks.context.rank REQUEST.json FOLDER`, with RANK etc. set."""

from __future__ import annotations

import json
import time

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
    """The communicator of a rank, which sums the seconds for which the rank waits for messages."""

    def __init__(self, groups: CpGroups, sizes: CpSizes) -> None:
        super().__init__(groups, sizes)
        self.waited = 0.0

    def start_pass(self, x: Tensor) -> Pending:
        pending = super().start_pass(x)

        def wait() -> Tensor:
            start = time.perf_counter()
            received = pending()
            self.waited += time.perf_counter() - start
            return received

        return wait

    def all_to_all(self, x: Tensor) -> Tensor:
        start = time.perf_counter()
        received = super().all_to_all(x)
        self.waited += time.perf_counter() - start
        return received


def main() -> None:
    """Time forward and backward of attention by each method in turns; rank 0 writes times.json."""
    with joined(ContextRequest) as (request, folder, rank):
        own = {name: _communicator(request, sizes) for name, sizes in request.methods.items()}
        found = {
            str(tokens): {name: _times(request, cp, tokens) for name, cp in own.items()} for tokens in request.seq_lens
        }
        if rank == 0:
            (folder / "times.json").write_text(json.dumps(found))


def _communicator(request: ContextRequest, sizes: CpSizes) -> TimedContextParallel:
    axes = Axes(cp=request.ranks)
    made = context_parallel(Layout(**axes.sizes._asdict(), micro_batch=1, accumulation=1), sizes, Trace(_CPU))
    assert isinstance(made, GroupContextParallel)
    return TimedContextParallel(made.groups, sizes)


def _times(request: ContextRequest, cp: TimedContextParallel, tokens: int) -> dict[str, list[float]]:
    """Return the slowest rank's seconds of each turn, and the most that a rank waited for messages in it."""
    generator = torch.Generator().manual_seed(cp.rank)
    q, grad, k, v = (
        torch.randn(1, tokens // cp.size, heads, request.head_dim, generator=generator)
        for heads in (request.heads, request.heads, request.kv_heads, request.kv_heads)
    )
    kernel, found = kernel_over(cp, "sdpa"), []
    for _ in range(WARMUP + request.repeats):
        world.barrier()
        cp.waited, start = 0.0, time.perf_counter()
        out, statistics = kernel.forward(q, k, v, None)
        kernel.backward(grad, q, k, v, out, statistics, None)
        found.append(world.maximum([time.perf_counter() - start, cp.waited], _CPU))
    seconds, waited = zip(*found[WARMUP:], strict=True)
    return {"seconds": list(seconds), "waited": list(waited)}


_CPU = torch.device("cpu")

if __name__ == "__main__":
    main()
