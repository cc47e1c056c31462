"""RMSNorm, SwiGLU and rotary embedding, each forward and backward beside its formula: what a layer does between GEMMs.

Shapes: B rows, T tokens, N = B * T, D hidden size, F intermediate size, H heads, K head size. Arithmetic in float32 at
least. On CUDA torch.compile makes one kernel of each function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, equation 4): (..., D) -> (..., D)."""
    return _for(x, _rms_norm)(x, weight, eps)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (dL/dx + residual, dL/dw) for g = dL/dy: dL/dx = r g w - x r^3 mean(g w x), dL/dw = sum of g x r.

    `residual` is the gradient that x has from its other use. Shapes: (..., D) and (D,); dL/dw is in float32 at least.
    """
    return _for(x, _rms_norm_backward)(grad, x, weight, eps, residual)


def swiglu(gate_up: Tensor) -> Tensor:
    """a = silu(g) u with silu(g) = g sigmoid(g) (Shazeer 2020): [g | u] (N, 2F) -> (N, F)."""
    return _for(gate_up, _swiglu)(gate_up)


def swiglu_backward(grad: Tensor, gate_up: Tensor, product: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (dL/d[g | u] (N, 2F), a (N, F)) for dL/da (N, F) and s = sigmoid(g); a = `product`, or is computed again.

    dL/du = dL/da g s, dL/dg = dL/da u s (1 + g (1 - s)).
    """
    grad_gate_up, again = _for(gate_up, _swiglu_backward)(grad, gate_up, product is None)
    return grad_gate_up, again if product is None else product


def rotate_(x: Tensor, tables: tuple[Tensor, Tensor]) -> None:
    """Rotate the pairs (x_i, x_{i+K/2}) of queries or keys by their positions, in place: (B, T, H, K), maybe a view."""
    cos, sin = _tables_for(x, tables)
    _for(x, _rotate)(x, cos, sin, x)


def rotate_back(grad: Tensor, tables: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Write dL/dx into `out` for y = R x and grad = dL/dy: the rotation by the opposite angle, R^T."""
    cos, sin = _tables_for(grad, tables)
    _for(grad, _rotate)(grad, cos, -sin, out)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(_wide(x))
    return (wide * _inverse_rms(wide, eps)).mul_(weight).to(x.dtype)


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    wide, g, w = x.to(_wide(x)), grad.to(_wide(x)), weight.to(_wide(x))
    inverse = _inverse_rms(wide, eps)
    product = (g * wide).flatten(0, -2)
    grad_weight = product.t() @ inverse.flatten()
    mean = (product @ w).view_as(inverse) / wide.shape[-1]
    grad_x = (g * w).mul_(inverse).addcmul_(wide, inverse.pow(3) * mean, value=-1)
    if residual is not None:
        grad_x.add_(residual)
    return grad_x.to(x.dtype), grad_weight


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    """(..., D) -> (..., 1)."""
    return torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(wide.shape[-1]).add_(eps).rsqrt_()


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(_wide(gate_up)).chunk(2, -1)
    return torch.nn.functional.silu(gate).mul_(up).to(gate_up.dtype)


def _swiglu_backward(grad: Tensor, gate_up: Tensor, again: bool) -> tuple[Tensor, Tensor | None]:
    wide = grad.to(_wide(grad))
    gate, up = gate_up.to(wide.dtype).chunk(2, -1)
    silu = torch.nn.functional.silu(gate)
    out = torch.empty_like(gate_up)
    grad_gate, grad_up = out.chunk(2, -1)
    if out.dtype != wide.dtype or torch.compiler.is_compiling():
        grad_gate.copy_(torch.ops.aten.silu_backward(wide * up, gate))
        grad_up.copy_(wide * silu)
    else:  # into place, which a compiler does by itself
        torch.ops.aten.silu_backward.grad_input(torch.mul(wide, up, out=grad_gate), gate, grad_input=grad_gate)
        torch.mul(wide, silu, out=grad_up)
    return out, silu.mul_(up).to(grad.dtype) if again else None


def _tables_for(x: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the part of `RotaryTables` for x's rows, in the width of the arithmetic."""
    length, dtype = x.shape[1], _wide(x)  # bf16 products would lose the relative-position property on long rows
    cos, sin = (table[:length].to(dtype) for table in tables)
    return cos, sin


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write x cos + swapped(x) sin, where swapped exchanges the halves of each head; `out` may be x."""
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, -1)
    swapped = torch.cat([second, first], -1)
    if out is x and x.dtype == cos.dtype:
        out.mul_(cos).addcmul_(swapped, sin)
    else:
        out.copy_((wide * cos).addcmul_(swapped, sin))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _for(x: Tensor, function: Callable[..., Any]) -> Callable[..., Any]:
    return _compiled(function) if x.is_cuda else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
