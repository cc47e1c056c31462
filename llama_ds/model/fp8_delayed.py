"""Matrix products in float8 with delayed scaling: a scale for each tensor, from its magnitudes in earlier steps.

A product has three tensors: its input, its stacked weights and the gradient of its output. Each rank notes their
largest magnitudes during a step. At its end one all-reduce makes them those of the whole batch and of whole matrices,
and every rank then has the table of the whole model. So no product waits for other ranks, and no scale depends on the
layout. What exceeds the largest magnitude of the last HISTORY steps is clamped to the format's largest number. The
first step has no history and scales rows (`fp8.py`). The history is part of a checkpoint.

As a tensor's scale does not depend on which tokens share a micro-batch, weight gradients can be products in float8,
too. Transformer Engine documents the recipe as delayed scaling.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama_ds.model.fp8 import (
    FORWARD,
    GRADIENT,
    INFINITE,
    SMALLEST,
    Fp8Products,
    Quantised,
    QuantisedWeights,
    multiply,
    powers_of,
    scales_of,
)
from llama_ds.model.linear import ShardedLinear, stacked
from llama_ds.model.pointwise import compiled_for
from llama_ds.model.products import column_bias, written
from llama_ds.model.tensor_parallel import TensorParallel

HISTORY = 16  # steps
PRODUCTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")  # by the first of their matrices
_INPUT, _WEIGHT, _GRADIENT = range(3)


class DelayedProducts:
    """`llama_ds.model.products.Products` in float8 with a scale for each tensor of the `layers` of the whole model."""

    def __init__(
        self,
        tp: TensorParallel,
        weights: QuantisedWeights,
        layers: int,
        weight_gradients: bool,
        agree: Callable[[Tensor], Tensor],
    ) -> None:
        """Start without a history.

        Args:
            weight_gradients: whether these are products in float8.
            agree: returns the elementwise maximum over all ranks of the job.
        """
        self._by_rows, self._weight_gradients, self._agree = Fp8Products(tp, weights), weight_gradients, agree
        self._weights = weights
        self._shape = (layers, len(PRODUCTS), 3)
        self._history: list[Tensor] = []  # `powers_of` the largest magnitudes in the last steps, the newest first
        self._powers: Tensor | None = None  # their maxima over the history
        self._noted: Tensor | None = None  # largest magnitudes in the current step on this rank

    @property
    def training(self) -> bool:
        """Whether magnitudes are noted, and weights kept."""
        return self._by_rows.training

    @training.setter
    def training(self, value: bool) -> None:
        self._by_rows.training = value

    def outputs(self, x: Tensor, layers: Sequence[ShardedLinear], out: Tensor | None = None) -> Tensor:
        self._note(layers, _INPUT, x)
        if self._powers is None:
            self._note(layers, _WEIGHT, _stack(layers))
            return self._by_rows.outputs(x, layers, out)
        y = multiply(self._quantised(layers, _INPUT, x, FORWARD), self._weight(layers, transposed=False), x.dtype)
        bias = column_bias(layers)
        return written(y if bias is None else y.add_(bias), out)

    def input_gradients(self, grad: Tensor, layers: Sequence[ShardedLinear], out: Tensor | None = None) -> Tensor:
        self._note(layers, _GRADIENT, grad)
        if self._powers is None:
            return self._by_rows.input_gradients(grad, layers, out)
        factor = self._quantised(layers, _GRADIENT, grad, GRADIENT)
        return written(multiply(factor, self._weight(layers, transposed=True), grad.dtype), out)

    def weight_gradient(self, grad: Tensor, x: Tensor, layers: Sequence[ShardedLinear]) -> Tensor | None:
        if not self._weight_gradients or self._powers is None:
            return None
        factors = (
            self._quantised(layers, _GRADIENT, grad.t(), GRADIENT),
            self._quantised(layers, _INPUT, x.t(), FORWARD),
        )
        return multiply(*factors, torch.float32)

    def end_step(self) -> None:
        """Agree on the magnitudes of the step, which scale the following ones. Collective over all ranks."""
        self._weights.forget()
        if self._noted is None:
            return
        found = self._agree(powers_of(self._noted))
        self._remember([torch.where(found < INFINITE, found, SMALLEST), *self._history])
        self._noted = torch.zeros_like(self._noted)

    def state(self) -> list[str]:
        """Return the history, a string for each step, the same on every rank. Synchronises with the device."""
        tables = (table.to("cpu", torch.int8).numpy().tobytes() for table in self._history)
        return [base64.b64encode(table).decode() for table in tables]

    def load(self, state: Sequence[str], device: torch.device) -> None:
        """Continue with the `state` of another run of the model, of any layout."""
        self._weights.forget()
        tables = (torch.frombuffer(bytearray(base64.b64decode(table)), dtype=torch.int8) for table in state)
        self._remember([table.view(self._shape).to(device, torch.int32) for table in tables])

    def _remember(self, tables: list[Tensor]) -> None:
        self._history = tables[:HISTORY]
        self._powers = torch.stack(self._history).amax(0) if self._history else None

    def _note(self, layers: Sequence[ShardedLinear], tensor: int, x: Tensor) -> None:
        if not self.training:
            return
        if self._noted is None:
            self._noted = torch.zeros(self._shape, device=x.device)
        layer, product = _index(layers)
        entry = self._noted[layer, product, tensor]
        entry.copy_(torch.maximum(entry, compiled_for(x, _largest)(x)))

    def _weight(self, layers: Sequence[ShardedLinear], transposed: bool) -> Quantised:
        kept = self._weights.find(layers, transposed)
        if kept is not None:
            return kept
        weight = _stack(layers)
        self._note(layers, _WEIGHT, weight)
        factor = self._quantised(layers, _WEIGHT, weight.t() if transposed else weight, FORWARD)
        return self._weights.put(layers, transposed, factor, self.training)

    def _quantised(self, layers: Sequence[ShardedLinear], tensor: int, x: Tensor, dtype: torch.dtype) -> Quantised:
        assert self._powers is not None
        layer, product = _index(layers)
        return compiled_for(x, _clamped)(x, self._powers[layer, product, tensor], dtype)


def _stack(layers: Sequence[ShardedLinear]) -> Tensor:
    return stacked([layer.weight for layer in layers])


def _index(layers: Sequence[ShardedLinear]) -> tuple[int, int]:
    """Return the number of a product's layer and of the product in it."""
    layer, name = layers[0].named
    return layer, PRODUCTS.index(name)


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax().to(torch.float32)


def _clamped(x: Tensor, power: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x in a format, with what exceeds it clamped, and its scale; infinite elements become NaN."""
    inverse, scale = scales_of(torch.where(power > SMALLEST, power, 0), dtype)
    limit = torch.finfo(dtype).max
    return ((x * inverse).clamp(-limit, limit) + (x - x)).to(dtype), scale
