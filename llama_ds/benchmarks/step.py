"""Times training steps against each other and against their lower bound, the bare matrix products of a step.

Shapes: B rows, T tokens of a row, N = B * T, (O, I) a weight matrix.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama_ds.config.schema import ModelConfig
from llama_ds.layout.weights import HEAD, Role, weights

Step = Callable[[], float]  # takes one step; returns its loss


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed step of a contestant, and its losses; the first is on the initial weights."""

    seconds: list[float]
    losses: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def time_interleaved(
    steps: Mapping[str, Step], repeats: int, warmup: int = 2, tick: Callable[[], object] = lambda: None
) -> dict[str, Timing]:
    """Run every step `warmup` + `repeats` times in turns, so that load on the machine affects all of them alike.

    Warm-up steps are not timed, but their losses are kept. `tick` is called after each step.
    """
    timings = {name: Timing([], []) for name in steps}
    for repeat in range(warmup + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            loss = step()
            if repeat >= warmup:
                timings[name].seconds.append(time.perf_counter() - start)
            timings[name].losses.append(loss)
            tick()
    return timings


def with_matmul_precision(step: Step, precision: str) -> Step:
    """Return the step with torch.set_float32_matmul_precision(`precision`) in effect."""

    def run() -> float:
        torch.set_float32_matmul_precision(precision)
        return step()

    return run


def training_step(
    module: nn.Module, optimizer: torch.optim.Optimizer, clip: float, forward: Callable[[], Tensor]
) -> Step:
    """Return the step of a plain torch training loop: forward and loss, backward, clip, update."""

    def step() -> float:
        optimizer.zero_grad()
        loss = forward()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        return loss.item()

    return step


def product_shapes(model: ModelConfig) -> list[tuple[int, ...]]:
    """Return the (O, I) of every matrix that multiplies tokens: those of the decoder layers and the head."""
    matrices = [weight.shape(model) for _, weight in weights(model) if weight.role is Role.HIDDEN_MATRIX]
    return [*matrices, HEAD.shape(model)]


def gemm_step(model: ModelConfig, tokens: int, dtype: torch.dtype) -> Step:
    """Return a step of the bare matrix products on `tokens` = N tokens, without those inside attention.

    Every matrix has its own weight and results, so that caches are as cold as in a real step.
    """
    problems = []
    for out, into in product_shapes(model):
        x, w, grad = torch.randn(tokens, into), torch.randn(out, into), torch.randn(tokens, out)
        problems.append(tuple(t.to(dtype) for t in (x, w, grad, torch.empty_like(w))))

    def step() -> float:
        for x, w, grad, grad_w in problems:
            torch.mm(x, w.t())  # y = x W^T
            torch.mm(grad, w)  # dL/dx = dL/dy W
            torch.mm(grad.t(), x, out=grad_w)  # dL/dW = dL/dy^T x
        return 0.0

    return step
