"""Matrices sharded over the tensor-parallel group, and the norm, which is replicated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ds.model.pointwise import rms_norm, rms_norm_backward
from llama_ds.model.tensor_parallel import TensorParallel


def describe(weight: Tensor, tp: TensorParallel, dim: int | None = None, whole: Sequence[int] | None = None) -> str:
    """Return shape and dtype of a weight in words, for `print(model)`. ZeRO-3 keeps the shape in `ds_shape`.

    Args:
        dim: dimension sharded over `tp`; None: the weight is replicated.
        whole: shape of the unsharded weight, which a padded shard does not tell; None: the shards are not padded.
    """
    shard = list(getattr(weight, "ds_shape", weight.shape))
    full = list(whole or (size * tp.size if i == dim else size for i, size in enumerate(shard)))
    cut = "" if full == shard else f", {shard} on this rank: dim {dim} cut over tp {tp.size}"
    return f"{full}{cut}, {str(weight.dtype).removeprefix('torch.')}"


class ShardedLinear(nn.Module):
    """y = x W^T + b with this rank's shard of W (out, in), sharded along dimension `cut`; b is optional.

    The bias of a row-parallel matrix (cut 1) is replicated and added once to the sum over ranks, by `reduced`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        cut: int | None,
        tp: TensorParallel,
        bias: nn.Parameter | None = None,
        whole: Sequence[int] | None = None,
        named: tuple[int, str] = (0, ""),
    ) -> None:
        """Hold this rank's shard.

        Args:
            whole: shape of the unsharded matrix; None: the shards are not padded.
            named: number of the decoder layer, and name within it, by which `Products` know the matrix.
        """
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.cut, self.tp, self.whole, self.named = cut, tp, whole, named

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's outputs, or its partial sums without the bias if the matrix is row-parallel."""
        return F.linear(x, self.weight, None if self.cut else self.bias)

    def reduced(self, partial: Tensor) -> Tensor:
        """Sum the partial outputs of a row-parallel matrix over ranks and add the bias: (B, T, D) -> (B, S, D)."""
        y = self.tp.leave(partial)
        return y if self.bias is None else y + self.tp.replicated(self.bias)

    def extra_repr(self) -> str:
        return describe(self.weight, self.tp, self.cut, self.whole) + ("" if self.bias is None else ", with bias")


def adjacent(matrices: Sequence[Tensor]) -> Tensor | None:
    """Return matrices (O_i, I) that are adjacent in memory as one view (sum of O_i, I), else None."""
    first, total = matrices[0], 0
    storage = first.untyped_storage().data_ptr()
    for matrix in matrices:
        follows = matrix.storage_offset() == first.storage_offset() + total
        if not (follows and matrix.is_contiguous() and matrix.untyped_storage().data_ptr() == storage):
            return None
        total += matrix.numel()
    return first.detach().as_strided((total // first.shape[1], first.shape[1]), first.stride())


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Return matrices with a common input as one matrix: a view if they are adjacent in memory, else a copy."""
    view = adjacent(matrices)
    return torch.cat([m.detach() for m in matrices]) if view is None else view


def lay_together(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters into one contiguous storage, so that `stacked` copies nothing.

    DeepSpeed's flat buffers keep neighbours adjacent. Under ZeRO-3 the partitions are left alone.
    """
    if any(hasattr(p, "ds_id") for p in parameters):
        return
    storage = torch.cat([p.detach() for p in parameters])
    for parameter, part in zip(parameters, storage.split([len(p) for p in parameters]), strict=True):
        parameter.data = part


class _Normed(torch.autograd.Function):
    """`pointwise.rms_norm` with its hand-written backward, which saves only x and the weight."""

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

    def __init__(self, weight: nn.Parameter, eps: float, tp: TensorParallel, of_heads: bool = False) -> None:
        """`of_heads`: whether each rank applies the weight to heads of its own, instead of tokens."""
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.tp = tp
        self.of_heads = of_heads

    def forward(self, x: Tensor) -> Tensor:
        return _Normed.apply(x, self.tp.replicated(self.weight), self.eps)

    def plain(self, x: Tensor) -> Tensor:
        """Compute the same with plain autograd."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * (wide.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
        # Both sum the gradient of the weight over ranks; the former only if they have different tokens.
        share = self.tp.enter if self.of_heads and not self.tp.sequence_parallel else self.tp.replicated
        return share(self.weight) * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{describe(self.weight, self.tp)}, eps {self.eps:g}"
