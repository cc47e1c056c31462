"""Flips a bit of a running engine at one of the sites of `request.IN_STEP`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from llama_ds.benchmarks.flips.request import Flip
from llama_ds.model import manual_backward
from llama_ds.model.decoder import DecoderLayer
from llama_ds.parallel.optimizer_state import flat_states
from llama_ds.training.engines.interface import Engine

_BITS = {2: torch.int16, 4: torch.int32}


def flip_bit(tensor: Tensor, flip: Flip, force: bool = False) -> None:
    """Flip a bit of a tensor, or set it with `force`."""
    flat = tensor.data.view(-1)
    bits = flat.view(_BITS[flat.element_size()])
    bit, width = flip.bit % (8 * flat.element_size()), 8 * flat.element_size()
    mask = -(2**bit) if bit == width - 1 else 2**bit
    at = int(flip.element * len(bits))
    bits[at] = (bits[at] | mask) if force else (bits[at] ^ mask)


@contextmanager
def flipped(engine: Engine, flip: Flip, checked: int, layers: int) -> Iterator[Callable[[str], None]]:
    """Flip before or in the step that is taken inside; the yielded function is called after its reduction and checks.

    `checked` is the number of the layer that is computed again, of `layers`.
    """
    module: Any = engine.deepspeed.module
    other = (checked + 1 + int(flip.layer * (layers - 1))) % layers
    layer = checked if flip.site.endswith("the checked layer") else other
    site: Any = nullcontext()
    if flip.site == "weights":
        flip_bit(_drawn(list(module.parameters()), flip), flip)
    elif flip.site in ("masters", "moments"):
        states = list(flat_states(engine.deepspeed))
        kinds = states[::3] if flip.site == "masters" else [state for i, state in enumerate(states) if i % 3]
        flip_bit(_drawn(kinds, flip), flip)
    elif flip.site.startswith("weight gradients"):
        decoders = [part for part in module.modules() if isinstance(part, DecoderLayer)]
        site = _in_gradient(engine, _drawn([p for p in decoders[layer].parameters() if p.dim() > 1], flip), flip)
    elif flip.site.startswith("activations"):
        always = flip.site == "activations, always the same bit"
        site = patch.object(manual_backward, "swiglu", _in_product(flip, layer, always))

    def after(part: str) -> None:
        if flip.site == f"gradients after the {part}":
            flip_bit(_drawn(engine.deepspeed.optimizer.fp32_groups_gradient_flat_partition, flip), flip)

    with site:
        yield after


def _drawn(tensors: list[Any], flip: Flip) -> Tensor:
    """Return one of the tensors, each as likely as it is large."""
    at = flip.layer * sum(tensor.numel() for tensor in tensors)
    for tensor in tensors:
        if at < tensor.numel():
            return tensor
        at -= tensor.numel()
    return tensors[-1]


@contextmanager
def _in_gradient(engine: Engine, matrix: Tensor, flip: Flip) -> Iterator[None]:
    """Flip a bit of the gradient of `matrix` as the first micro-batch has computed it."""
    observers, done = engine.context.weight_gradients.observers, False

    def observe(weight: nn.Parameter, buffer: Tensor, micro_batches: int) -> None:
        nonlocal done
        if weight is matrix and not done:
            done = True
            flip_bit(buffer, flip)

    observers.insert(0, observe)
    try:
        yield
    finally:
        observers.remove(observe)
    assert done, "the gradient has no buffer"


def _in_product(flip: Flip, layer: int, always: bool) -> Callable[[Tensor], Tensor]:
    """Return a SwiGLU that flips a bit of the product in the first micro-batch's forward of a layer, or sets it."""
    plain, calls = manual_backward.swiglu, 0

    def swiglu(gate_up: Tensor) -> Tensor:
        nonlocal calls
        product = plain(gate_up)
        if always or calls == layer:
            flip_bit(product, flip, force=always)
        calls += 1
        return product

    return swiglu
