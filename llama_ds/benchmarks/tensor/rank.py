"""One rank: `python -m llama_ds.benchmarks.tensor.rank REQUEST.json FOLDER`, with RANK etc. set."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama_ds.benchmarks.ranks import joined
from llama_ds.benchmarks.tensor.run import PASSES, TensorRequest
from llama_ds.config.schema import ModelConfig
from llama_ds.job.trace_format import RANK_FILE
from llama_ds.layout.axes import Axes
from llama_ds.layout.layout import Layout
from llama_ds.model.attention import CausalAttention
from llama_ds.model.cpu_products import choose_products
from llama_ds.model.decoder import LayerContext
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.model.products import PlainProducts, Stateless
from llama_ds.model.rope import RotaryTables
from llama_ds.parallel import world
from llama_ds.parallel.grid import tensor_parallel
from llama_ds.parallel.trace import Trace

WARMUP = 1  # untimed turns
HEAD = 64
_CPU = torch.device("cpu")


class PacedProducts(Stateless):
    """Products that take the time of a given rate without a processor, and return zeros."""

    def __init__(self, gflops: float) -> None:
        self._rate = gflops * 1e9

    def outputs(self, x: Tensor, layers: Sequence[Any], out: Tensor | None = None) -> Tensor:
        return self._product(x, sum(len(layer.weight) for layer in layers), out)

    def input_gradients(self, grad: Tensor, layers: Sequence[Any], out: Tensor | None = None) -> Tensor:
        return self._product(grad, layers[0].weight.shape[1], out)

    def weight_gradient(self, grad: Tensor, x: Tensor, layers: Sequence[Any]) -> Tensor:  # type: ignore[override]
        return self._product(grad.t(), x.shape[1], None)

    def _product(self, x: Tensor, width: int, out: Tensor | None) -> Tensor:
        time.sleep(2 * x.numel() * width / self._rate)
        return x.new_zeros(len(x), width) if out is None else out.zero_()


class Stack:
    """Layers that cut their tokens into `chunks`, and the trace of their collectives."""

    def __init__(self, request: TensorRequest, chunks: int) -> None:
        self._request, self._trace = request, Trace(_CPU)
        layout = Layout(**Axes(tp=request.ranks).sizes._asdict(), micro_batch=request.rows, accumulation=1)
        tp = tensor_parallel(layout, True, self._trace, chunks)
        heads = request.hidden // HEAD
        model = ModelConfig(64, request.hidden, request.intermediate, request.layers, heads, heads, HEAD)
        products = PlainProducts() if request.paced_gflops is None else PacedProducts(request.paced_gflops)
        rotary = RotaryTables(model, request.seq_len)
        context = LayerContext(model, 7, tp, CausalAttention("sdpa"), rotary, products=products)
        context.weight_gradients.deferred = request.deferred
        self._layers = [ManualBackwardLayer(context, i, first=i == 0) for i in range(request.layers)]
        self._stack = nn.Sequential(*self._layers)
        generator = torch.Generator().manual_seed(tp.rank)
        shape = request.rows, request.seq_len // request.ranks, request.hidden
        self._x, self._grad = (torch.randn(shape, generator=generator) for _ in range(2))
        self._rank = tp.rank

    def turn(self, folder: Path) -> dict[str, float]:
        """Return the seconds of forward and backward, and of their waits, as the trace has them."""
        trace, x = self._trace, self._x.clone().requires_grad_()
        self._stack.zero_grad()
        world.barrier()
        trace.start()
        begin = trace.now()
        y = self._stack(x)
        trace.add("forward", begin)
        begin = trace.now()
        y.backward(self._grad)
        trace.add("backward", begin)
        trace.write(str(folder), self._rank)
        if self._request.deferred:
            for layer in self._layers:
                layer.run_deferred_wgrad()
        events = json.loads((folder / RANK_FILE.format(self._rank)).read_text())["events"]
        found = dict[str, float]()
        for name in PASSES:
            ((begin, end),) = [span for what, *span, _, _, _ in events if what == name]
            waits = [to - at for what, at, to, *_ in events if what == "wait tp" and begin <= at <= end]
            found |= {name: (end - begin) / 1e6, f"{name} waits": sum(waits) / 1e6}
        return found


def main() -> None:
    """Time the stacks in turns; rank 0 writes times.json."""
    with joined(TensorRequest) as (request, folder, rank):
        choose_products()
        stacks = {chunks: Stack(request, chunks) for chunks in request.chunks}
        found: dict[str, dict[str, list[float]]] = {str(chunks): defaultdict(list) for chunks in stacks}
        for turn in range(WARMUP + request.repeats):
            for chunks, stack in stacks.items():
                times = stack.turn(folder)
                longest = world.maximum([times[name] for name in PASSES], _CPU)
                waits = world.total([times[f"{name} waits"] for name in PASSES], _CPU)
                for name, seconds, waited in zip(PASSES, longest, waits, strict=True):
                    if turn >= WARMUP:
                        found[str(chunks)][name].append(seconds)
                        found[str(chunks)][f"{name} waits"].append(waited / request.ranks)
        if rank == 0:
            (folder / "times.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
