"""Matrix products in float8 with current scaling: activations and weights in e4m3, output gradients in e5m2.

A product contracts the last dimension of both of its factors, and each row of a factor has a scale of its own: a token
of x or dL/dy, an output channel of W in the forward, an input channel of W in the backward. So no number depends on
which tokens share a micro-batch or a rank. Where tensor-parallel ranks share the contracted dimension, they agree on
the largest magnitude of each row, and quantise to what one rank would.

Scales are the largest powers of two that keep a row within the format. They round nothing by themselves: an element
loses only the digits of its mantissa, and what is below 2^-9 (e4m3) or 2^-16 (e5m2) once its row is scaled.

Weight gradients contract over tokens, of which no rank has all; they keep the dtype of the run. See Micikevicius et al.
(arXiv 2209.05433) for the formats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama_ds.errors import UserError
from llama_ds.model.linear import ShardedLinear, stacked
from llama_ds.model.pointwise import compiled_for
from llama_ds.model.products import Stateless, column_bias, written
from llama_ds.model.tensor_parallel import TensorParallel

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST_EXPONENT = {FORWARD: 8, GRADIENT: 15}  # the largest number of each format is 1.75 * 2^this
CAPABILITY = (8, 9)  # first compute capability (Ada; Hopper is 9.0) with products in float8
SMALLEST, INFINITE = -127, 128  # exponents of 0 and of what is not finite
_MANTISSA_BITS, _EXPONENT_BIAS, _MANTISSA_OF_LARGEST = 23, 127, 0x600000  # float32; 1.75 is 1.11 in binary


Quantised = tuple[Tensor, Tensor]  # a float8 tensor (N, K), and its scale: a number, or one for each row (N, 1)


class QuantisedWeights:
    """Weights in float8, along each of their dimensions, from their first use in a step to its end.

    Without `keep` they are quantised at each use. Kept ones take two bytes for each element of a matrix.
    """

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._kept: dict[tuple[tuple[int, str], bool], Quantised] = {}

    def find(self, layers: Sequence[ShardedLinear], transposed: bool) -> Quantised | None:
        """Return a kept weight (O, I), or `transposed` (I, O); None: it has to be quantised."""
        return self._kept.get((layers[0].named, transposed))

    def put(self, layers: Sequence[ShardedLinear], transposed: bool, weight: Quantised, training: bool) -> Quantised:
        """Return a weight, contiguous, and keep it in `training`: a step notes the magnitudes of what it quantises."""
        weight = weight[0].contiguous(), weight[1]
        if self._keep and training:
            self._kept[layers[0].named, transposed] = weight
        return weight

    def forget(self) -> None:
        """Forget all, because the weights change."""
        self._kept.clear()


class Fp8Products(Stateless):
    """`llama_ds.model.products.Products` in float8; `tp` is the group that shares the matrices."""

    def __init__(self, tp: TensorParallel, weights: QuantisedWeights) -> None:
        self.tp, self.weights = tp, weights

    def outputs(self, x: Tensor, layers: Sequence[ShardedLinear], out: Tensor | None = None) -> Tensor:
        y = self._product(x, FORWARD, layers, transposed=False)
        bias = column_bias(layers)
        return written(y if bias is None else y.add_(bias), out)

    def input_gradients(self, grad: Tensor, layers: Sequence[ShardedLinear], out: Tensor | None = None) -> Tensor:
        return written(self._product(grad, GRADIENT, layers, transposed=True), out)

    def end_step(self) -> None:
        self.weights.forget()

    def _product(self, x: Tensor, dtype: torch.dtype, layers: Sequence[ShardedLinear], transposed: bool) -> Tensor:
        """Return x W^T, or x W if W is `transposed`, for x quantised to `dtype`."""
        kept, maxima = self.weights.find(layers, transposed), [row_maxima(x)]
        if kept is None:
            weight = stacked([layer.weight for layer in layers])
            weight = weight.t() if transposed else weight
            maxima.append(row_maxima(weight))
        if self.tp.size > 1 and layers[0].cut == (0 if transposed else 1):  # ranks share the contracted dimension
            maxima = list(self.tp.all_reduce_max(torch.cat(maxima)).split([len(part) for part in maxima]))
        if kept is None:
            kept = self.weights.put(layers, transposed, quantised(weight, maxima[1], FORWARD), self.training)
        return multiply(quantised(x, maxima[0], dtype), kept, x.dtype)


def multiply(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """Return a b^T in `dtype` for quantised a (N, K) and b (M, K), both scaled by rows or both as a whole."""
    # Fast accumulation keeps fewer digits of a sum; a layer's outputs bear that, gradients less.
    fast = a[0].dtype == FORWARD
    return torch._scaled_mm(
        a[0].contiguous(), b[0].contiguous().t(), a[1], b[1].t(), out_dtype=dtype, use_fast_accum=fast
    )


def row_maxima(x: Tensor) -> Tensor:
    """Return the largest magnitude of each row, in float32: (N, K) -> (N, 1)."""
    return compiled_for(x, _row_maxima)(x)


def quantised(x: Tensor, maxima: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x (N, K) in a float8 `dtype`, and the scales (N, 1) by which its rows are to be multiplied.

    `maxima` (N, 1) are magnitudes that no element of their row exceeds. A row with infinite or undefined ones becomes
    NaN, because e4m3 has no infinity.
    """
    return compiled_for(x, _quantised)(x, maxima, dtype)


def check_capability(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError if the device has no products in float8 whose results are of `dtype`. Every CPU has.

    On GPUs, products scaled by rows return fp32 only from cuBLAS 12.9 on, and only on Hopper.
    """
    if device.type != "cuda":
        return
    if dtype != torch.bfloat16:
        raise UserError(
            "compute.fp8: products in float8 return bf16 on a GPU, and this run computes in fp32; set "
            "deepspeed.bf16.enabled=true or compute.fp8=off"
        )
    if torch.cuda.get_device_capability(device) >= CAPABILITY:
        return
    major, minor = torch.cuda.get_device_capability(device)
    raise UserError(
        f"compute.fp8: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and products in "
        f"float8 need {'.'.join(map(str, CAPABILITY))} (Ada, Hopper or newer); set compute.fp8=off"
    )


def powers_of(maxima: Tensor) -> Tensor:
    """Return the smallest k with 1.75 * 2^k of at least each number, as int32; SMALLEST for 0, INFINITE if not finite.

    It is read off the bits of float32, because a logarithm would be rounded.
    """
    bits = maxima.view(torch.int32)
    exponent = (bits >> _MANTISSA_BITS) - _EXPONENT_BIAS
    above = (bits & ((1 << _MANTISSA_BITS) - 1)) > _MANTISSA_OF_LARGEST
    return torch.where(exponent < INFINITE, exponent + above.to(torch.int32), INFINITE).to(torch.int32)


def scales_of(powers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the largest power of two that scales 1.75 * 2^powers into a format, and its inverse; NaN for INFINITE."""
    shift = (powers - LARGEST_EXPONENT[dtype]).clamp(-126, 126)
    inverse, scale = (
        torch.where(powers < INFINITE, ((power + _EXPONENT_BIAS) << _MANTISSA_BITS).view(torch.float32), torch.nan)
        for power in (-shift, shift)
    )
    return inverse, scale


def _row_maxima(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True).to(torch.float32)


def _quantised(x: Tensor, maxima: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inverse, scale = scales_of(powers_of(maxima), dtype)
    return (x * inverse).to(dtype), scale
