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

BLOCK_ELEMENTS = 1 << 17  # of a CPU block: 512 KiB in float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, equation 4): (..., D) -> (..., D)."""
    if x.is_cuda:
        return _compiled(_rms_norm)(x, weight, eps)
    y = torch.empty_like(x)
    flat, out = x.flatten(0, -2), y.flatten(0, -2)
    for rows in blocks(flat):
        out[rows] = _rms_norm(flat[rows], weight, eps)
    return y


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (dL/dx, dL/dw) for g = dL/dy and n = x r: dL/dx = r (g w - n mean(g w n)), dL/dw = sum over tokens of g n.

    Shapes: (..., D) twice and (D,) -> (..., D) and (D,); dL/dw is in float32 at least.
    """
    if x.is_cuda:
        return _compiled(_rms_norm_backward)(grad, x, weight, eps)
    grad_x = torch.empty_like(x)
    grad_weight = x.new_zeros(weight.shape, dtype=_wide(x))
    flat_grad, flat, out = grad.flatten(0, -2), x.flatten(0, -2), grad_x.flatten(0, -2)
    for rows in blocks(flat):
        out[rows], part = _rms_norm_backward(flat_grad[rows], flat[rows], weight, eps)
        grad_weight += part
    return grad_x, grad_weight


def swiglu(gate_up: Tensor) -> Tensor:
    """a = silu(g) u with silu(g) = g sigmoid(g) (Shazeer 2020): [g | u] (N, 2F) -> (N, F)."""
    if gate_up.is_cuda:
        return _compiled(_swiglu)(gate_up)
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    for rows in blocks(gate_up):
        out[rows] = _swiglu(gate_up[rows])
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dL/d[g | u] (N, 2F), a (N, F)) for dL/da (N, F), s = sigmoid(g): the product comes with the gradient.

    dL/du = dL/da g s, dL/dg = dL/da u s (1 + g (1 - s)).
    """
    if gate_up.is_cuda:
        return _compiled(_swiglu_backward)(grad, gate_up)
    grad_gate_up, product = torch.empty_like(gate_up), torch.empty_like(grad)
    for rows in blocks(gate_up):
        grad_gate_up[rows], product[rows] = _swiglu_backward(grad[rows], gate_up[rows])
    return grad_gate_up, product


def rotate_(x: Tensor, tables: tuple[Tensor, Tensor]) -> None:
    """Rotate the pairs (x_i, x_{i+K/2}) of queries or keys by their positions, in place: (B, T, H, K), maybe a view."""
    cos, sin = _tables_for(x, tables)
    x.copy_(_compiled(_rotated)(x, cos, sin) if x.is_cuda else _rotated(x, cos, sin))


def rotate_back(grad: Tensor, tables: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Write dL/dx into `out` for y = R x and grad = dL/dy: the rotation by the opposite angle, R^T."""
    cos, sin = _tables_for(grad, tables)
    out.copy_(_compiled(_rotated)(grad, cos, -sin) if grad.is_cuda else _rotated(grad, cos, -sin))


def _tables_for(x: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = tables
    length, dtype = x.shape[1], _wide(x)  # bf16 products would lose the relative-position property on long rows
    return cos[:length].to(dtype), sin[:length].to(dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(_wide(x))
    inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * inverse).mul_(weight).to(x.dtype)


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide, w = grad.to(_wide(x)), weight.to(_wide(x))
    x = x.to(_wide(x))
    inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = x * inverse
    product = wide * normed
    grad_weight = product.flatten(0, -2).sum(0)
    mean = product.mul_(w).mean(-1, keepdim=True)
    grad_x = (wide * w).sub_(normed.mul_(mean)).mul_(inverse)
    return grad_x.to(grad.dtype), grad_weight


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(_wide(gate_up)).chunk(2, -1)
    return torch.nn.functional.silu(gate).mul_(up).to(gate_up.dtype)


def _swiglu_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    wide = grad.to(_wide(grad))
    gate, up = gate_up.to(wide.dtype).chunk(2, -1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    product = silu * up
    # s (1 + g (1 - s)) = s + silu (1 - s) = s + silu - silu s
    slope = silu.addcmul(silu, sigmoid, value=-1).add_(sigmoid)
    out = torch.empty_like(gate_up, dtype=wide.dtype)
    grad_gate, grad_up = out.chunk(2, -1)
    torch.mul(wide, up, out=grad_gate).mul_(slope)
    torch.mul(wide, silu, out=grad_up)
    return out.to(grad.dtype), product.to(grad.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, -1)
    out = torch.empty_like(x, dtype=cos.dtype)
    left, right = out.chunk(2, -1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out.to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def blocks(x: Tensor) -> Iterator[slice]:
    """Cut a matrix into slices of rows that a core's cache holds; on CUDA into one."""
    if x.is_cuda:
        return iter((slice(None),))
    step = max(1, BLOCK_ELEMENTS // x.shape[1])
    return (slice(start, start + step) for start in range(0, len(x), step))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
