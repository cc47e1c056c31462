"""Compute rates of one rank: matrix products, attention and pointwise kernels of the trainer, at many sizes.

Rates are in the units of `perf/plan/curves.py`. Caches are flushed before each timed call, because in a step the other
layers evict them too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llama_ds.config.schema import RunConfig
from llama_ds.model.attention import choose_backend
from llama_ds.model.attention_kernels import attention_kernel
from llama_ds.model.llama import layer_context
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.model.pointwise import (
    rms_norm,
    rms_norm_backward,
    rotate_heads,
    rotate_heads_back,
    swiglu,
    swiglu_backward,
)
from llama_ds.model.tensor_parallel import SingleRank
from llama_ds.parallel import world
from llama_ds.perf.plan.curves import AttentionRates, Kernels, ProductRates, Rate, medians
from llama_ds.perf.plan.program import OURS, OURS_FP32

Progress = Callable[[str], None]
PASSES = 3


@dataclass(frozen=True)
class MeasuredSizes:
    """The problem sizes to measure."""

    products: tuple[int, ...]
    head_dim: tuple[int, ...]
    seq_len: tuple[int, ...]
    tokens: tuple[int, ...]  # token counts for the pointwise kernels
    hidden: int  # hidden size for the pointwise kernels
    cache_bytes: int  # larger than the device's caches


CPU = MeasuredSizes(
    (32, 64, 128, 256, 512, 1024, 2048), (32, 64, 128), (128, 256, 512, 1024), (64, 512, 4096), 256, 64 << 20
)
CUDA = MeasuredSizes(
    (256, 512, 1024, 2048, 4096, 8192, 16384),
    (64, 128),
    (512, 1024, 2048, 4096, 8192),
    (512, 2048, 8192),
    4096,
    128 << 20,
)
QUICK = MeasuredSizes((32, 128), (32,), (32, 64), (64, 256), 64, 1 << 20)


@dataclass(frozen=True)
class Computing:
    """The rates of one rank."""

    products: ProductRates
    attention: AttentionRates
    kernels: Kernels
    launch_us: float  # host time to launch a kernel


class DeviceTimer:
    """Times calls on a device; on CUDA with events."""

    def __init__(self, device: torch.device, sizes: MeasuredSizes) -> None:
        self.device = device
        self._scratch = torch.zeros(sizes.cache_bytes, dtype=torch.uint8, device=device)

    def time(self, call: Callable[[], object], turns: int = 5) -> float:
        """Return the seconds of a call: the median of `turns` calls after one warm-up call."""
        return statistics.median([self._once(call) for _ in range(1 + turns)][1:])

    def _once(self, call: Callable[[], object]) -> float:
        self._scratch.add_(1)
        if self.device.type == "cpu":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3


def measure(
    run: RunConfig, sizes: MeasuredSizes, device: torch.device, dtype: torch.dtype, progress: Progress
) -> dict[str, Any]:
    """Return the `Computing` rates of this rank's device, each the median over several passes to reduce noise.

    `run` determines the attention backend.
    """
    clock, passes = DeviceTimer(device, sizes), []
    for number in range(1, PASSES + 1):

        def report(text: str, number: int = number) -> None:
            progress(f"pass {number} of {PASSES}: {text}")

        products = measure_products(sizes, clock, dtype, report)
        report("attention, pointwise kernels, launch overhead")
        attention, kernels = measure_attention(run, sizes, clock, dtype), measure_kernels(sizes, clock, dtype)
        passes.append(asdict(Computing(products, attention, kernels, measure_host(run, device, dtype))))
    return medians(passes)


def measure_products(sizes: MeasuredSizes, clock: DeviceTimer, dtype: torch.dtype, progress: Progress) -> ProductRates:
    """Return the rates of products (M, K) (K, N), as the mean over the three forms that occur in a step.

    The forms x W^T, dy W and dy^T x differ in which factor is transposed.
    """

    def rate(m: int, n: int, k: int) -> float:
        a, b, out = (torch.randn(shape, device=clock.device).to(dtype) for shape in ((m, k), (k, n), (m, n)))
        forms = ((a, b.view(n, k).t()), (a, b), (a.view(k, m).t(), b))
        seconds = statistics.mean(clock.time(partial(torch.mm, x, y, out=out), turns=2) for x, y in forms)
        return 2.0 * m * n * k / seconds / 1e12

    planes = []
    for m in sizes.products:
        progress(f"products of {m} rows")
        planes.append(tuple(tuple(rate(m, n, k) for k in sizes.products) for n in sizes.products))
    return ProductRates(sizes.products, tuple(planes))


def measure_attention(run: RunConfig, sizes: MeasuredSizes, clock: DeviceTimer, dtype: torch.dtype) -> AttentionRates:
    """Return the rates of the attention backend that the run selects on this device.

    Causal FLOPs are counted: 2 products in the forward, 5 in the backward. Heads share keys and values as in the run,
    which costs copies if the kernel does not support grouped heads.
    """
    shared_by = run.model.num_attention_heads // run.model.num_key_value_heads
    heads = max(4, shared_by)

    def rates(head_dim: int, seq_len: int) -> tuple[float, float]:
        rows = max(1, sizes.seq_len[-1] // seq_len)
        kernel = attention_kernel(choose_backend(run.compute.attention_backend, clock.device.type, dtype, head_dim))
        q, grad, k, v = (
            torch.randn(rows, seq_len, count, head_dim, device=clock.device).to(dtype)
            for count in (heads, heads, heads // shared_by, heads // shared_by)
        )
        out, statistics_ = kernel.forward(q, k, v, None)
        flops = 2.0 * rows * heads * head_dim * seq_len * (seq_len + 1) / 2
        forward = clock.time(lambda: kernel.forward(q, k, v, None))
        backward = clock.time(lambda: kernel.backward(grad, q, k, v, out, statistics_, None))
        return 2 * flops / forward / 1e12, 5 * flops / backward / 1e12

    found = [[rates(head_dim, seq_len) for seq_len in sizes.seq_len] for head_dim in sizes.head_dim]
    forward, backward = (tuple(tuple(pair[i] for pair in row) for row in found) for i in (0, 1))
    return AttentionRates(sizes.head_dim, sizes.seq_len, forward, backward)


def measure_kernels(sizes: MeasuredSizes, clock: DeviceTimer, dtype: torch.dtype) -> Kernels:
    """Return the rates of a layer, the loss and the optimizer without their matrix products.

    The bytes are those of `perf/plan/program.py`, which assumes that each function reads and writes once.
    """
    program = OURS if dtype == torch.bfloat16 else OURS_FP32
    wide = dtype.itemsize / 2
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("forward", "backward", "loss", "optimizer")}
    for tokens in sizes.tokens:
        numbers = _layer_numbers(tokens, sizes.hidden)
        for name, call in _layer_calls(tokens, sizes.hidden, clock.device, dtype).items():
            moved = wide * sum(
                getattr(getattr(program, part), name) * count
                for part, count in zip(("hidden", "heads", "inner"), numbers, strict=True)
            )
            found[name].append((moved, moved / clock.time(call) / 1e9))
        vocab = 8 * sizes.hidden
        moved = wide * (program.logits.forward + program.logits.backward) * tokens * vocab
        found["loss"].append((moved, moved / _loss_time(tokens, vocab, clock, dtype) / 1e9))
        parameters = 4 * tokens * sizes.hidden
        moved = program.optimizer_bytes * parameters
        found["optimizer"].append((moved, moved / clock.time(_optimizer_call(parameters, clock.device)) / 1e9))
    return Kernels(**{name: Rate(*map(tuple, zip(*points, strict=True))) for name, points in found.items()})


def _layer_numbers(tokens: int, hidden: int) -> tuple[int, int, int]:
    """Return the numbers of activations: hidden; heads (queries, keys, values, result); intermediate."""
    return tokens * hidden, 4 * tokens * hidden, tokens * _inner(hidden)


def _inner(hidden: int) -> int:
    return 8 * hidden // 3


def _layer_calls(tokens: int, hidden: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return the sequences of pointwise functions in a layer's forward and backward."""
    heads = max(1, hidden // 64)
    x, grad, residual = (torch.randn(1, tokens, hidden, device=device).to(dtype) for _ in range(3))
    weight = torch.ones(hidden, device=device, dtype=dtype)
    qkv = torch.randn(1, tokens, 3 * heads, hidden // heads, device=device).to(dtype)
    gate_up, grad_product = (torch.randn(tokens, width * _inner(hidden), device=device).to(dtype) for width in (2, 1))
    product = swiglu(gate_up)
    angles = torch.rand(tokens, 1, hidden // heads, device=device)
    tables = (angles.cos(), angles.sin())
    thirds = tuple(part.contiguous() for part in qkv.chunk(3, 2))

    def forward() -> None:
        for _ in range(2):
            rms_norm(x, weight, 1e-5)
            grad.add_(residual)
        rotate_heads(qkv, 2 * heads, tables)
        swiglu(gate_up)

    def backward() -> None:
        for _ in range(2):
            rms_norm_backward(residual, x, weight, 1e-5, residual)
        rotate_heads_back(thirds, tables)  # type: ignore[arg-type]
        swiglu_backward(grad_product, gate_up, product)

    return {"forward": forward, "backward": backward}


def _loss_time(tokens: int, vocab: int, clock: DeviceTimer, dtype: torch.dtype, hidden: int = 16) -> float:
    """Return the time of the loss without its three matrix products."""
    loss = NextTokenLoss(SingleRank())
    weight = torch.randn(vocab, hidden, device=clock.device).to(dtype).requires_grad_()
    x = torch.randn(1, tokens, hidden, device=clock.device).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (1, tokens), device=clock.device)
    logits = torch.randn(tokens, vocab, device=clock.device).to(dtype)
    rows, matrix = x.detach()[0], weight.detach()

    def products() -> None:
        rows @ matrix.t()
        logits @ matrix
        logits.t() @ rows

    total = clock.time(lambda: loss((x, weight), labels))
    return max(total / 10, total - clock.time(products))


def _optimizer_call(parameters: int, device: torch.device) -> Callable[[], object]:
    """Return an optimizer step: gradient norm, AdamW, zeroing of gradients."""
    weight = torch.zeros(parameters, device=device).requires_grad_()
    weight.grad = torch.ones(parameters, device=device)
    adam = torch.optim.AdamW([weight], fused=True)

    def step() -> None:
        assert weight.grad is not None
        torch.linalg.vector_norm(weight.grad)
        adam.step()
        weight.grad.zero_()

    return step


def measure_host(run: RunConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Return the host's microseconds per kernel, from a layer so small that it is launch-bound."""
    model = replace(
        run.model, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16
    )
    tiny = replace(run, model=model, data=replace(run.data, seq_len=8, document_mask=False))
    layer = ManualBackwardLayer(layer_context(tiny, SingleRank(), device.type, dtype), 0).to(device, dtype)
    layer.lay_weights_together()
    x = torch.randn(1, 8, 32, device=device).to(dtype).requires_grad_()
    grad = torch.randn_like(x)

    def both() -> None:
        output = layer(x)
        assert isinstance(output, Tensor)
        output.backward(grad)

    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(20):
            both()
        world.finish(device)
        times.append((time.perf_counter() - begin) / 20)
    return statistics.median(times) * 1e6 / (OURS.kernels_forward + OURS.kernels_backward)
