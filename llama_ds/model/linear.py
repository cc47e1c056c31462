"""Matrices cut over the tensor-parallel group, and the norm that every rank holds whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ds.model.init import normal_shard
from llama_ds.model.tensor_parallel import TensorParallel

ROWS, COLUMNS = 0, 1  # the dimension of the (out, in) weight that is cut: column-parallel layers cut their outputs


@dataclass(frozen=True)
class WeightKey:
    """Where a weight's initial values come from."""

    seed: int
    layer: int
    std: float


def mark_tensor_parallel(weight: nn.Parameter) -> nn.Parameter:
    """Tell DeepSpeed that the weight differs between tensor-parallel ranks, so its norm counts on each of them."""
    weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    return weight


class ShardedLinear(nn.Module):
    """y = x W^T with this rank's part of W (out, in), cut along `dim`; no bias, no collective."""

    def __init__(self, out_size: int, in_size: int, dim: int, name: str, key: WeightKey, tp: TensorParallel) -> None:
        super().__init__()
        shard = normal_shard((out_size, in_size), dim, tp.rank, tp.size, key.std, key.seed, key.layer, name)
        self.weight = nn.Parameter(shard)
        if tp.size > 1:
            mark_tensor_parallel(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with its backward written out: torch has a fused kernel on CUDA only, elsewhere it strings operators.

    With n = x r, r = 1 / sqrt(mean(x^2) + eps): y = n w, dL/dw = sum over tokens of g n,
    dL/dx = r (g w - n mean(g n w)). Computed in float32 at least; only x and r are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, w = grad.to(inverse.dtype), weight.to(inverse.dtype)
        normed = x * inverse
        product = wide * normed
        grad_weight = product.flatten(0, -2).sum(0)
        mean = torch.mv(product.flatten(0, -2), w).div_(x.shape[-1]).view_as(inverse)
        grad_x = normed.mul_(-mean).addcmul_(wide, w).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dimension (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, hidden_size: int, eps: float, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        weight = self.tp.replicated(self.weight)
        if x.device.type == "cuda":
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return _RMSNorm.apply(x, weight, self.eps)
