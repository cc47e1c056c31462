"""The pointwise operations between a layer's GEMMs: RMSNorm, SwiGLU and rotary embedding, with formulas.

Shapes: B rows, T tokens, N = B * T, D hidden size, F intermediate size, H heads, K head size. Arithmetic is in
float32 or wider. On CUDA torch.compile fuses each function into one kernel, and RMSNorm's backward into three.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, equation 4): (..., D) -> (..., D)."""
    return compiled_for(x, _rms_norm)(x, weight, eps)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (dL/dx + residual, dL/dw) for g = dL/dy: dL/dx = r g w - x r^3 mean(g w x), dL/dw = sum of g x r.

    `residual` is the gradient of x from the residual branch. Shapes: (..., D) and (D,); dL/dw is in float32 or wider.
    """
    return compiled_for(x, _rms_norm_backward)(grad, x, weight, eps, residual)


def swiglu(gate_up: Tensor) -> Tensor:
    """a = silu(g) u with silu(g) = g sigmoid(g) (Shazeer 2020): [g | u] (N, 2F) -> (N, F)."""
    return compiled_for(gate_up, plain_swiglu)(gate_up)


def swiglu_backward(grad: Tensor, gate_up: Tensor, product: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (dL/d[g | u] (N, 2F), a (N, F)) for dL/da (N, F) and s = sigmoid(g); a = `product`, or is recomputed.

    dL/du = dL/da g s, dL/dg = dL/da u s (1 + g (1 - s)).
    """
    grad_gate_up = torch.empty_like(gate_up)
    # Two tensors: the compiler would write the halves of one tensor in two passes over all of it.
    halves = grad_gate_up.chunk(2, -1)
    recomputed = compiled_for(gate_up, _swiglu_backward)(grad, gate_up, *halves, product is None)
    return grad_gate_up, recomputed if product is None else product


def rotate_heads(qkv: Tensor, num_rotated_heads: int, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Return R x for the pairs (x_i, x_{i+K/2}) of the first `num_rotated_heads`, else x: (B, T, heads, K).

    On a CPU it works in place. On a GPU an in-place kernel would have to read its input again after writing it.
    """
    cos, sin = _tables_for(qkv, tables)
    if qkv.is_cuda:
        return _compiled(_rotated_heads)(qkv, num_rotated_heads, cos, sin)
    _rotate(qkv[:, :, :num_rotated_heads], cos, sin, qkv[:, :, :num_rotated_heads])
    return qkv


def rotate_heads_back(grads: tuple[Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor]) -> Tensor:
    """Return [R^T dq | R^T dk | dv] (B, T, H + 2 G, K): the rotation by the opposite angle, for y = R x."""
    cos, sin = _tables_for(grads[0], tables)
    return compiled_for(grads[0], _rotated_back)(*grads, cos, sin)


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


def plain_swiglu(gate_up: Tensor) -> Tensor:
    """Compute `swiglu` without compiling it, for shapes that change."""
    gate, up = gate_up.to(_wide(gate_up)).chunk(2, -1)
    return torch.nn.functional.silu(gate).mul_(up).to(gate_up.dtype)


def _swiglu_backward(
    grad: Tensor, gate_up: Tensor, grad_gate: Tensor, grad_up: Tensor, recompute: bool
) -> Tensor | None:
    wide = grad.to(_wide(grad))
    gate, up = gate_up.to(wide.dtype).chunk(2, -1)
    silu = torch.nn.functional.silu(gate)
    if grad_up.dtype != wide.dtype or torch.compiler.is_compiling():
        grad_gate.copy_(torch.ops.aten.silu_backward(wide * up, gate))
        grad_up.copy_(wide * silu)
    else:  # write directly into the outputs, as the compiler does by itself
        torch.ops.aten.silu_backward.grad_input(torch.mul(wide, up, out=grad_gate), gate, grad_input=grad_gate)
        torch.mul(wide, silu, out=grad_up)
    return silu.mul_(up).to(grad.dtype) if recompute else None


def _tables_for(x: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the part of `RotaryTables` for x's rows, in the dtype of the arithmetic."""
    length, dtype = x.shape[1], _wide(x)  # bf16 products would lose the relative-position property on long rows
    cos, sin = (table[:length].to(dtype) for table in tables)
    return cos, sin


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write x cos + swapped(x) sin, where swapped exchanges the halves of each head; `out` may be x."""
    if out is x and x.dtype == cos.dtype:
        swapped = _swapped(x)
        out.mul_(cos).addcmul_(swapped, sin)
    else:
        out.copy_(rotated(x, cos, sin))


def _rotated_heads(qkv: Tensor, num_rotated_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    is_rotated = torch.arange(qkv.shape[2], device=qkv.device)[:, None] < num_rotated_heads
    return torch.where(is_rotated, rotated(qkv, cos, sin).to(qkv.dtype), qkv)


def _rotated_back(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    back = [rotated(grad, cos, -sin).to(grad.dtype) for grad in (grad_q, grad_k)]
    return torch.cat([*back, grad_v], 2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x cos + swapped(x) sin in the dtype of the tables, where swapped exchanges the halves of each head."""
    wide = x.to(cos.dtype)
    return (wide * cos).addcmul_(_swapped(wide), sin)


def _swapped(x: Tensor) -> Tensor:
    return x.roll(x.shape[-1] // 2, -1)  # the compiler fuses roll, but not a concatenation


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def compiled_for(x: Tensor, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, compiled into one kernel if x is on CUDA."""
    return _compiled(function) if x.is_cuda else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
