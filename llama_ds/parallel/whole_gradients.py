"""Reduced gradients that every data-parallel replica holds whole, and the norm by which replicas take a step.

DeepSpeed's BF16_Optimizer sums the whole gradient on every rank, and each rank then takes its norm alone. With a bit
that has flipped since, one rank would clip its part of the update differently from the others, or skip a step that they
take, and never send the weights for which they wait. Here the replicas compare their norms first. DeepSpeed's other
optimizers, and `pipeline_optimizer.py`, sum the norm over all ranks anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from llama_ds.parallel.pipeline_optimizer import PipelineOptimizer
from llama_ds.parallel.tensor_parallel import all_gather_flat

TOLERANCE = 1e-4  # relative: processors of different kinds add in different orders

_norm_of_own = bf16_optimizer.get_global_norm_of_tensors


class NormsDiffer(Exception):
    """Replicas have different norms of the same gradient. Raised on all ranks alike; nothing was updated."""


def compare_norms() -> None:
    """Let every BF16_Optimizer of this process compare its norm with those of its replicas before it takes a step."""
    bf16_optimizer.get_global_norm_of_tensors = _agreed_norm


def _agreed_norm(input_tensors: list[Tensor], mpu: Any = None, **options: Any) -> Tensor:
    """Return the norm, -1 if it is not finite, the same on all replicas. Collective; synchronises, as the caller does.

    Raises:
        NormsDiffer: on all ranks.
    """
    own = _norm_of_own(input_tensors, mpu=mpu, **options)
    if mpu is None or mpu.get_data_parallel_world_size() == 1:
        return own
    every = own.new_empty(mpu.get_data_parallel_world_size())
    all_gather_flat(every, own.view(1), group=mpu.get_data_parallel_group())
    lowest, highest = every.aminmax()
    if highest - lowest > TOLERANCE * highest.abs():
        raise NormsDiffer(f"replicas have different norms of the same gradient: {every.tolist()}")
    return highest


def whole_gradients(engine: Any) -> list[Tensor]:
    """Return the reduced gradients that each replica of a DeepSpeed engine holds whole, [] if it shards them."""
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer) and not isinstance(optimizer, PipelineOptimizer):
        return list(optimizer.fp32_groups_gradients_flat)
    if isinstance(optimizer, torch.optim.Optimizer):  # fp32 without ZeRO
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    return []


def own_norm(optimizer: BF16_Optimizer) -> float:
    """Return the norm of this rank's gradients alone, without other tensor-parallel ranks; -1 if it is not finite."""
    gradients, _ = optimizer.get_grads_for_norm()
    return float(_norm_of_own(gradients))


def different(norms: np.ndarray, group: Sequence[int]) -> list[int]:
    """Return the ranks of a group of replicas whose norm is not that of the others.

    `norms` are those of all ranks (R,), -1 where not finite: a flipped bit makes a norm infinite, but hardly finite.
    All of the group are returned if more than half do not agree.
    """
    members = np.array(group)
    of_group = norms[members]
    finite = of_group >= 0
    if finite.any() and not finite.all():
        return members[~finite].tolist()
    near = np.abs(of_group[:, None] - of_group) <= TOLERANCE * np.abs(of_group)
    agree = 2 * near.sum(1) > len(group)
    return members[~agree].tolist()
