"""What DeepSpeed's engines hold between steps: weights, gradients and states of the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from llama_ds.parallel.dry_run.ledger import GRADIENTS, OPTIMIZER, WEIGHTS, tensors_in
from llama_ds.parallel.optimizer_state import fragments

# Attributes of BF16_Optimizer and of ZeRO 1 to 3 that hold buffers.
_GRADIENTS = ("fp32_groups_gradients_flat", "averaged_gradients", "grad_partitions_flat_buffer", "ipg_buffer")
_WEIGHTS = ("bf16_groups_flat", "bit16_groups_flat", "fp16_partitioned_groups_flat")


def held_bytes(engine: Any) -> dict[str, int]:
    """Return the bytes on the engine's device by category. A storage counts once: in fp32 masters are the weights."""
    found, seen = dict.fromkeys((WEIGHTS, GRADIENTS, OPTIMIZER), 0), set()
    for category, tensors in (
        (WEIGHTS, weight_tensors(engine)),
        (GRADIENTS, gradient_tensors(engine)),
        (OPTIMIZER, optimizer_tensors(engine)),
    ):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen and tensor.device.type == engine.device.type:
                seen.add(storage._cdata)
                found[category] += storage.nbytes()
    return found


def weight_tensors(engine: Any) -> Iterator[Tensor]:
    """Yield the buffers of weights, the weights, and under ZeRO-3 this rank's parts of them."""
    yield from _buffers(engine.optimizer, _WEIGHTS)
    for parameter in engine.module.parameters():
        yield parameter
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor


def gradient_tensors(engine: Any) -> Iterator[Tensor]:
    """Yield the buffers of gradients, and the gradients that autograd has accumulated."""
    yield from _buffers(engine.optimizer, _GRADIENTS)
    for parameter in engine.module.parameters():
        yield from gradients_of(parameter)


def gradients_of(parameter: nn.Parameter) -> list[Tensor]:
    """Return the parameter's gradient in a list, [] if it has none."""
    return [] if parameter.grad is None else [parameter.grad]


def optimizer_tensors(engine: Any) -> Iterator[Tensor]:
    """Yield the masters, and the moments that exist already."""
    for fragment in fragments(engine):
        yield from fragment.tensors.values()


def _buffers(optimizer: Any, names: tuple[str, ...]) -> Iterator[Tensor]:
    for name in names:
        yield from tensors_in(getattr(optimizer, name, None))
