"""RMSNorm, SwiGLU and rotary embedding, each forward and backward beside its formula: what a layer does between GEMMs.

Shapes: N = B * T tokens, D hidden size, F intermediate size, H heads, K head size. Arithmetic in float32 at least.
On CUDA torch.compile makes one kernel of each function; on the CPU they run over blocks of rows whose temporaries stay
in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 17


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, equation 4): (..., D) -> (..., D)."""
    if x.is_cuda:
        return _compiled(_rms_norm)(x, weight, eps)
    y = torch.empty_like(x)
    flat, out = x.flatten(0, -2), y.flatten(0, -2)
    for rows in blocks(flat):
        _rms_norm(flat[rows], weight, eps, out[rows])
    return y


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (dL/dx + residual, dL/dw) for g = dL/dy: dL/dx = r g w - x r^3 mean(g w x), dL/dw = sum of g x r.

    `residual` is the gradient that x has from its other use. Shapes: (..., D) and (D,); dL/dw is in float32 at least.
    """
    if x.is_cuda:
        return _compiled(_rms_norm_backward)(grad, x, weight, eps, residual)
    grad_x = torch.empty_like(x)
    grad_weight = x.new_zeros(weight.shape, dtype=_wide(x))
    flat_grad, flat, out = (t.flatten(0, -2) for t in (grad, x, grad_x))
    rest = None if residual is None else residual.flatten(0, -2)
    for rows in blocks(flat):
        here = None if rest is None else rest[rows]
        grad_weight += _rms_norm_backward(flat_grad[rows], flat[rows], weight, eps, here, out[rows])[1]
    return grad_x, grad_weight


def swiglu(gate_up: Tensor) -> Tensor:
    """a = silu(g) u with silu(g) = g sigmoid(g) (Shazeer 2020): [g | u] (N, 2F) -> (N, F)."""
    if gate_up.is_cuda:
        return _compiled(_swiglu)(gate_up)
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    for rows in blocks(gate_up):
        _swiglu(gate_up[rows], out[rows])
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor, product: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (dL/d[g | u] (N, 2F), a (N, F)) for dL/da (N, F) and s = sigmoid(g); a = `product`, or is computed again.

    dL/du = dL/da g s, dL/dg = dL/da u s (1 + g (1 - s)).
    """
    if gate_up.is_cuda:
        grad_gate_up, again = _compiled(_swiglu_backward)(grad, gate_up, product is None)
        return grad_gate_up, again if product is None else product
    grad_gate_up = torch.empty_like(gate_up)
    again = torch.empty_like(grad) if product is None else None
    for rows in blocks(gate_up):
        _swiglu_backward(
            grad[rows], gate_up[rows], again is not None, grad_gate_up[rows], None if again is None else again[rows]
        )
    return grad_gate_up, product if again is None else again  # type: ignore[return-value]


def rotate_(x: Tensor, tables: tuple[Tensor, Tensor]) -> None:
    """Rotate the pairs (x_i, x_{i+K/2}) of queries or keys by their positions, in place: (B, T, H, K), maybe a view."""
    cos, sin = _tables_for(x, tables)
    (_compiled(_rotate) if x.is_cuda else _rotate)(x, cos, sin, x)


def rotate_back(grad: Tensor, tables: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Write dL/dx into `out` for y = R x and grad = dL/dy: the rotation by the opposite angle, R^T."""
    cos, sin = _tables_for(grad, tables)
    (_compiled(_rotate) if grad.is_cuda else _rotate)(grad, cos, -sin, out)


def _tables_for(x: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = tables
    length, dtype = x.shape[1], _wide(x)  # bf16 products would lose the relative-position property on long rows
    return cos[:length].to(dtype), sin[:length].to(dtype)


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    """(N, D) -> (N, 1)."""
    return torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(wide.shape[-1]).add_(eps).rsqrt_()


def _rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    wide = x.to(_wide(x))
    target = _same_width(out, wide)
    y = torch.mul(wide, _inverse_rms(wide, eps), out=target).mul_(weight)
    return _narrow(y, x, out)


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide, g, w = x.to(_wide(x)), grad.to(_wide(x)), weight.to(_wide(x))
    inverse = _inverse_rms(wide, eps)
    product = (g * wide).flatten(0, -2)
    grad_weight = product.t() @ inverse.flatten()
    mean = (product @ w).view_as(inverse) / wide.shape[-1]
    y = torch.mul(g, w, out=_same_width(out, wide)).mul_(inverse)
    y.addcmul_(wide, inverse.pow(3) * mean, value=-1)
    if residual is not None:
        y.add_(residual)
    return _narrow(y, x, out), grad_weight


def _swiglu(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    gate, up = gate_up.to(_wide(gate_up)).chunk(2, -1)
    target = _same_width(out, up)
    silu = torch.nn.functional.silu(gate) if target is None else torch.ops.aten.silu.out(gate, out=target)
    return _narrow(silu.mul_(up), gate_up, out)


def _swiglu_backward(
    grad: Tensor, gate_up: Tensor, again: bool, out: Tensor | None = None, product_out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    wide = grad.to(_wide(grad))
    gate_up_wide = gate_up.to(wide.dtype)
    gate, up = gate_up_wide.chunk(2, -1)
    silu = torch.nn.functional.silu(gate)
    target = _same_width(out, wide)
    if target is None:
        result = torch.cat([torch.ops.aten.silu_backward(wide * up, gate), wide * silu], -1)
    else:
        grad_gate, grad_up = target.chunk(2, -1)
        torch.ops.aten.silu_backward.grad_input(wide * up, gate, grad_input=grad_gate)
        torch.mul(wide, silu, out=grad_up)
        result = target
    result = _narrow(result, grad, out)
    if not again:
        return result, None
    return result, _narrow(torch.mul(silu, up, out=_same_width(product_out, wide)), grad, product_out)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """`out` may be x."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    left = (first * cos).addcmul_(second, sin, value=-1)
    right = (second * cos).addcmul_(first, sin)
    out_left, out_right = out.chunk(2, -1)
    out_left.copy_(left)
    out_right.copy_(right)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _same_width(out: Tensor | None, like: Tensor) -> Tensor | None:
    """Return `out` if results of `like`'s width can be written to it."""
    return out if out is not None and out.dtype == like.dtype else None


def _narrow(result: Tensor, like: Tensor, out: Tensor | None) -> Tensor:
    """Bring a wide result to the width of `like`: into `out` where there is one and it is not there yet."""
    if out is None:
        return result.to(like.dtype)
    return result if result is out or result.dtype == out.dtype else out.copy_(result)


def blocks(x: Tensor) -> Iterator[slice]:
    """Cut a matrix into slices of rows that a core's cache holds; on CUDA into one."""
    if x.is_cuda:
        return iter((slice(None),))
    step = max(1, BLOCK_ELEMENTS // x.shape[1])
    return (slice(start, start + step) for start in range(0, len(x), step))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
