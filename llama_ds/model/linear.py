"""Matrices cut over the tensor-parallel group, and the norm that every rank holds whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ds.model.pointwise import rms_norm, rms_norm_backward
from llama_ds.model.tensor_parallel import TensorParallel


def describe(weight: Tensor, tp: TensorParallel, dim: int | None = None) -> str:
    """Return shape and dtype of a weight in words, for `print(model)`.

    `dim` is the dimension that `tp` cuts; None: every rank holds the whole weight. Under ZeRO-3 the shape is in
    `ds_shape`.
    """
    part = list(getattr(weight, "ds_shape", weight.shape))
    whole = [size * tp.size if i == dim else size for i, size in enumerate(part)]
    cut = "" if whole == part else f", {part} on this rank: dim {dim} cut over tp {tp.size}"
    return f"{whole}{cut}, {str(weight.dtype).removeprefix('torch.')}"


class ShardedLinear(nn.Module):
    """y = x W^T with this rank's part of W (out, in), which `tp` cuts along `cut`; no bias, no collective."""

    def __init__(self, weight: nn.Parameter, cut: int | None, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = weight
        self.cut, self.tp = cut, tp

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return describe(self.weight, self.tp, self.cut)


def adjacent(matrices: Sequence[Tensor]) -> Tensor | None:
    """Return matrices (O_i, I) that lie one behind the other in memory as one view (sum of O_i, I), else None."""
    first, total = matrices[0], 0
    storage = first.untyped_storage().data_ptr()
    for matrix in matrices:
        behind = matrix.storage_offset() == first.storage_offset() + total
        if not (behind and matrix.is_contiguous() and matrix.untyped_storage().data_ptr() == storage):
            return None
        total += matrix.numel()
    return first.detach().as_strided((total // first.shape[1], first.shape[1]), first.stride())


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Return matrices that multiply the same input as one: a view where they are adjacent, else a copy."""
    whole = adjacent(matrices)
    return torch.cat([m.detach() for m in matrices]) if whole is None else whole


def lay_together(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters into one storage, one behind the other, so that `stacked` copies nothing.

    DeepSpeed's flat buffers keep neighbours together; under ZeRO-3 its partitions are left alone.
    """
    if any(hasattr(p, "ds_id") for p in parameters):
        return
    whole = torch.cat([p.detach() for p in parameters])
    for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        parameter.data = part


class _Normed(torch.autograd.Function):
    """`pointwise.rms_norm` with its written-out backward: only x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = rms_norm_backward(grad, x, weight, ctx.eps)
        return grad_x, grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dimension (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, weight: nn.Parameter, eps: float, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        return _Normed.apply(x, self.tp.replicated(self.weight), self.eps)

    def plain(self, x: Tensor) -> Tensor:
        """Compute the same by autograd."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * (wide.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
        return self.tp.replicated(self.weight) * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{describe(self.weight, self.tp)}, eps {self.eps:g}"
