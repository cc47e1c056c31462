"""Training steps timed against each other, and the floor below all of them: the bare matrix products of the step.

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

Step = Callable[[], float]  # one whole step; returns its loss


@dataclass(frozen=True)
class Timing:
    """Seconds per step, over the repeats of one contestant, and its losses: the first on the initial weights."""

    seconds: list[float]
    losses: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def time_interleaved(
    steps: Mapping[str, Step], repeats: int, warmup: int = 2, tick: Callable[[], object] = lambda: None
) -> dict[str, Timing]:
    """Run every step `warmup` + `repeats` times in turns, so that a busy moment of the machine hits all of them.

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


def with_products(step: Step, precision: str) -> Step:
    """Return the step with float32 matrix products as torch.set_float32_matmul_precision(`precision`) chooses them."""

    def run() -> float:
        torch.set_float32_matmul_precision(precision)
        return step()

    return run


def training_step(
    module: nn.Module, optimizer: torch.optim.Optimizer, clip: float, forward: Callable[[], Tensor]
) -> Step:
    """Return the step of a plain torch loop: forward and loss, backward, clip, update."""

    def step() -> float:
        optimizer.zero_grad()
        loss = forward()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        return loss.item()

    return step


def product_shapes(model: ModelConfig) -> list[tuple[int, ...]]:
    """Return the (O, I) of every matrix that a token is multiplied with: the decoder layers' and the head's."""
    matrices = [weight.shape(model) for _, weight in weights(model) if weight.role is Role.HIDDEN_MATRIX]
    return [*matrices, HEAD.shape(model)]


def gemm_step(model: ModelConfig, tokens: int, dtype: torch.dtype) -> Step:
    """Return the step's bare matrix products on `tokens` = N tokens: the attention's own are not among them.

    Every matrix has its own weight and its own results, as in a step: nothing stays in a cache that would not there.
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
