"""A debugging aid: finds the first layer whose output or gradient is not finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llama_ds.errors import UserError


def check_layers(layers: Iterable[tuple[int, nn.Module]], num_hidden_layers: int) -> None:
    """Make every layer check its output and the gradient of its output; `layers` are (index in the model, layer).

    The checks synchronise with the device at each layer and raise UserError in the forward or the backward.
    """
    for index, layer in layers:
        name = layer_name(index, num_hidden_layers)
        layer.register_forward_hook(lambda _, inputs, output, name=name: _check_output(name, inputs, output))


def layer_name(index: int, num_hidden_layers: int) -> str:
    """Return the name used in messages for layer `index` of [embedding, decoder layers, final norm, head]."""
    if 1 <= index <= num_hidden_layers:
        return f"decoder layer {index - 1} of {num_hidden_layers}"
    return {0: "the embedding", num_hidden_layers + 1: "the final norm"}.get(index, "the head")


def _check_output(name: str, inputs: tuple[object, ...], output: object) -> None:
    if (count := _bad(output)) and not _bad(inputs[0]):
        raise UserError(
            f"logging.check_finite: {name} outputs {count} values that are NaN or infinite, from finite inputs"
        )
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, Tensor) and first.requires_grad:
        first.register_hook(lambda grad: _check_gradient(name, grad))


def _check_gradient(name: str, grad: Tensor) -> None:
    if count := _bad(grad):
        raise UserError(
            f"logging.check_finite: the gradient of the output of {name} has {count} values that are NaN or infinite"
        )


def _bad(value: object) -> int:
    """Return the number of non-finite elements of the first tensor in `value`."""
    first = value[0] if isinstance(value, tuple) else value
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return 0
    return int((~torch.isfinite(first)).sum())
