"""One decoder layer's forward and backward: its time, what it keeps between the two, and its peak of memory.

Shapes: B rows, T tokens of a row, D hidden size. A rank of tp holds 1 / tp of the heads and intermediate features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from llama_ds.benchmarks.step import Step, with_products
from llama_ds.config.schema import ModelConfig
from llama_ds.log import without_profiler_marks


def shard(model: ModelConfig, tp: int) -> ModelConfig:
    """Return the layer shape of one of `tp` ranks, without the communication between them."""
    return replace(
        model,
        num_attention_heads=model.num_attention_heads // tp,
        num_key_value_heads=model.num_key_value_heads // tp,
        intermediate_size=model.intermediate_size // tp,
    )


@dataclass(frozen=True)
class LayerContestant:
    """A layer, how to call it, who multiplies for it (`with_products`), and constant tensors (tables) that it shares
    with others and does not pay for."""

    module: nn.Module
    call: Callable[[Tensor], Tensor]
    products: str
    constants: tuple[Tensor, ...] = ()

    def step(self, x: Tensor, grad: Tensor) -> Step:
        """Return the step forward, backward for x and grad (B, T, D); it yields the size of the input's gradient."""

        def run() -> float:
            self.module.zero_grad()
            inputs = x.detach().requires_grad_()
            self.call(inputs).backward(grad)
            assert inputs.grad is not None
            return float(inputs.grad.norm())  # waits for the device

        return with_products(run, self.products)

    def saved_bytes(self, x: Tensor) -> int:
        """Return the bytes that autograd keeps for the backward, without weights and constants."""
        return saved_bytes(lambda: self.call(x.detach().requires_grad_()), [*self.module.parameters(), *self.constants])

    def peak_bytes(self, step: Step, device: torch.device) -> int:
        """Return by how much memory rises during a step, at its peak; the weights' gradients are part of it."""
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
    """Return the bytes of the distinct storages that autograd keeps from `forward`, but for those of `constants`."""
    known = {t.untyped_storage().data_ptr() for t in constants}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # alive until counted: no address is used twice
    assert output.requires_grad
    return sum(kept.values())
