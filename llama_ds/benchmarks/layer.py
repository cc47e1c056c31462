"""Forward and backward of one decoder layer: time, memory of saved activations and peak memory.

Shapes: B rows, T tokens of a row, D hidden size. A rank holds 1 / tp of the heads and intermediate features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from llama_ds.benchmarks.step import Step, with_matmul_precision
from llama_ds.config.schema import ModelConfig
from llama_ds.log import without_profiler_marks


def shard(model: ModelConfig, tp: int) -> ModelConfig:
    """Return the shape of a layer's shard on one of `tp` ranks; communication is not simulated."""
    return replace(
        model,
        num_attention_heads=model.num_attention_heads // tp,
        num_key_value_heads=model.num_key_value_heads // tp,
        intermediate_size=model.intermediate_size // tp,
    )


@dataclass(frozen=True)
class LayerContestant:
    """A layer, its call, its matmul precision, and constant tensors (tables) that do not count as saved memory."""

    module: nn.Module
    call: Callable[[Tensor], Tensor]
    precision: str
    constants: tuple[Tensor, ...] = ()
    after: Callable[[], None] = lambda: None  # ends a step

    def step(self, x: Tensor, grad: Tensor) -> Step:
        """Return a step, forward and backward for x and grad (B, T, D), that returns the norm of the input gradient."""

        def run() -> float:
            self.module.zero_grad()
            inputs = x.detach().requires_grad_()
            self.call(inputs).backward(grad)
            self.after()
            assert inputs.grad is not None
            return float(inputs.grad.norm())  # synchronises with the device

        return with_matmul_precision(run, self.precision)

    def saved_bytes(self, x: Tensor) -> int:
        """Return the bytes that autograd saves for the backward, without weights and constants."""
        return saved_bytes(lambda: self.call(x.detach().requires_grad_()), [*self.module.parameters(), *self.constants])

    def peak_bytes(self, step: Step, device: torch.device) -> int:
        """Return the peak increase of memory during a step, which includes the weight gradients."""
        self.module.zero_grad()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            step()
            return torch.cuda.max_memory_allocated(device) - before
        with without_profiler_marks(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        now = peak = 0
        events = profiler.profiler.kineto_results.events()
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        return peak


def saved_bytes(forward: Callable[[], Tensor], constants: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages that autograd saves in `forward`, except those of `constants`."""
    known = {t.untyped_storage().data_ptr() for t in constants}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # kept alive, so that no address is reused before the count
    assert output.requires_grad
    return sum(kept.values())
