"""The matrix products of a decoder layer with a hand-written backward, as the layer asks for them.

Shapes: N tokens, I inputs and O outputs of matrices that share their input, stacked by rows: W (O, I). `linear.py` says
what is sharded: column-parallel matrices by O, row-parallel ones by I.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llama_ds.model.linear import ShardedLinear, stacked


class Products(Protocol):
    """How a layer multiplies by its matrices."""

    training: bool  # whether the forward that runs is one of training, which a backward follows

    def outputs(self, x: Tensor, layers: Sequence[ShardedLinear], out: Tensor | None = None) -> Tensor:
        """Return x W^T, with the biases of column-parallel layers: (N, I) -> (N, O). Not differentiable.

        It is written to `out` if given.
        """

    def input_gradients(self, grad: Tensor, layers: Sequence[ShardedLinear], out: Tensor | None = None) -> Tensor:
        """Return dL/dx = dL/dy W of `outputs`: (N, O) -> (N, I), written to `out` if given."""

    def weight_gradient(self, grad: Tensor, x: Tensor, layers: Sequence[ShardedLinear]) -> Tensor | None:
        """Return dL/dW (O, I) = dL/dy^T x in float32; None: it is an ordinary product (`weight_gradients.py`)."""

    def end_step(self) -> None:
        """Finish an optimizer step. Collective."""

    def state(self) -> list[str]:
        """Return what a resumed run needs of the steps before, the same on every rank."""

    def load(self, state: Sequence[str], device: torch.device) -> None:
        """Continue with the `state` of the same model under any layout."""


class Stateless:
    """Products that keep nothing from step to step, and leave weight gradients to `weight_gradients.py`."""

    training = False

    def weight_gradient(self, grad: Tensor, x: Tensor, layers: Sequence[ShardedLinear]) -> None:
        return None

    def end_step(self) -> None:
        pass

    def state(self) -> list[str]:
        return []

    def load(self, state: Sequence[str], device: torch.device) -> None:
        pass


class PlainProducts(Stateless):
    """Products in the dtype of the tensors."""

    def outputs(self, x: Tensor, layers: Sequence[ShardedLinear], out: Tensor | None = None) -> Tensor:
        weight, bias = stacked([layer.weight for layer in layers]).t(), column_bias(layers)
        return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)

    def input_gradients(self, grad: Tensor, layers: Sequence[ShardedLinear], out: Tensor | None = None) -> Tensor:
        return torch.mm(grad, stacked([layer.weight for layer in layers]), out=out)


def column_bias(layers: Sequence[ShardedLinear]) -> Tensor | None:
    """Return the biases of column-parallel layers side by side; None without, and for row-parallel layers."""
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None and layer.cut == 0]
    return torch.cat(biases) if biases else None


def written(y: Tensor, out: Tensor | None) -> Tensor:
    """Return y, copied to `out` if given, for products that cannot write to it themselves."""
    return y if out is None else out.copy_(y)
