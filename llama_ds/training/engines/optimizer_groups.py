"""The optimizer of a rank's layers: parameter groups and gradient accumulation buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from llama_ds.config.schema import OptimizerConfig
from llama_ds.layout.optimizer_states import ADAMW
from llama_ds.layout.weights import weight_of
from llama_ds.model.weight_gradients import WeightGradients

MATRICES = "matrices"
REPLICATED = "norms"  # and the biases that are added to the residual stream
SHARDED = "biases"


def decay_groups(module: nn.Module, settings: OptimizerConfig, name: str = "") -> list[dict[str, Any]]:
    """Return the optimizer groups of a module: matrices with weight decay, norm weights and biases without.

    Weights of a group have the same kinds of state, because each state is one flat buffer for the group, and are all
    replicated over tensor-parallel ranks or all sharded, because the gradient norm counts the former once.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[nn.Parameter]] = {}
    for parameter_name, parameter in module.named_parameters():
        weight = weight_of(parameter_name)
        label = MATRICES if weight.decays else REPLICATED if weight.cut is None else SHARDED
        groups.setdefault((label, ADAMW.kinds(weight.role)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": settings.weight_decay * (label == MATRICES), "name": name + label}
        for label in (MATRICES, REPLICATED, SHARDED)
        for (found, _), parameters in groups.items()
        if found == label
    ]


def build_optimizer(
    groups: list[dict[str, Any]], settings: OptimizerConfig, config: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return AdamW over `groups`, or DeepSpeed's CPU Adam if the DeepSpeed configuration offloads the optimizer."""
    if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the learning rate of all groups of a DeepSpeed engine's optimizer."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def accumulate_in_fp32(weight_gradients: WeightGradients, optimizer: Any) -> None:
    """Let layers add their weight gradients directly to the fp32 buffers of DeepSpeed's BF16_Optimizer, if it is one.

    DeepSpeed would accumulate bf16 gradients there itself. This saves the bf16 gradient, its zeroing and its copy.
    """
    if isinstance(optimizer, BF16_Optimizer):
        weight_gradients.buffer_of = _fp32_buffers(optimizer)


def _fp32_buffers(optimizer: BF16_Optimizer) -> Callable[[nn.Parameter], Tensor]:
    """Return a function that maps a parameter to its fp32 gradient buffer and marks the buffer as filled."""
    index = {id(p): (i, j) for i, group in enumerate(optimizer.bf16_groups) for j, p in enumerate(group)}

    def buffer_of(parameter: nn.Parameter) -> Tensor:
        i, j = index[id(parameter)]
        buffer = optimizer.fp32_groups_gradients[i][j]
        optimizer.fp32_groups_has_gradients[i][j] = True
        parameter._hp_grad = buffer  # type: ignore[attr-defined]
        return buffer.view(parameter.shape)

    return buffer_of
