"""Matrices cut over the tensor-parallel group, and the norm that every rank holds whole."""

from __future__ import annotations

from dataclasses import dataclass

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


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dimension (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, hidden_size: int, eps: float, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.tp.replicated(self.weight), self.eps)
