"""The optimizer of a rank's layers: parameter groups and gradient accumulation buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor, nn

from llama_ds.config.schema import ModelConfig, OptimizerConfig, RunConfig
from llama_ds.layout.layout import Layout
from llama_ds.layout.mup import inverse_width, rate_factor
from llama_ds.layout.optimizer_states import states_of
from llama_ds.layout.weights import Role, weight_of
from llama_ds.model.weight_gradients import WeightGradients
from llama_ds.parallel.bf16_masters import use_weights_as_masters
from llama_ds.parallel.elementwise import Elementwise
from llama_ds.parallel.muon import Muon

MATRICES = "matrices"
REPLICATED = "norms"  # and the biases that are added to the residual stream
SHARDED = "biases"


def decay_groups(
    module: nn.Module, settings: OptimizerConfig, model: ModelConfig, name: str = ""
) -> list[dict[str, Any]]:
    """Return the optimizer groups of a module: matrices with weight decay, norm weights and biases without.

    Weights of a group have the same kinds of state, because each state is one flat buffer for the group, and are all
    replicated over tensor-parallel ranks or all sharded, because the gradient norm counts the former once. Under muP
    their learning rates also have one factor.
    """
    states, groups = states_of(settings), dict[tuple[str, tuple[str, ...], bool, float], list[nn.Parameter]]()
    for parameter_name, parameter in module.named_parameters():
        weight = weight_of(parameter_name)
        label = MATRICES if weight.decays else REPLICATED if weight.cut is None else SHARDED
        by_muon = settings.name == "muon" and weight.role is Role.HIDDEN_MATRIX
        rate = rate_factor(weight.role, model, settings)
        groups.setdefault((label, states.kinds(weight.role), by_muon, rate), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay * (label == MATRICES) / rate,
            "name": name + label,
            **({"muon": True} if by_muon else {}),
            **({"lr_factor": rate, "eps": settings.eps * inverse_width(model)} if inverse_width(model) != 1 else {}),
        }
        for label in (MATRICES, REPLICATED, SHARDED)
        for (found, _, by_muon, rate), parameters in groups.items()
        if found == label
    ]


def build_optimizer(groups: list[dict[str, Any]], run: RunConfig, config: dict[str, Any]) -> torch.optim.Optimizer:
    """Return the run's optimizer over `groups`; AdamW is DeepSpeed's for CPUs if the DeepSpeed `config` offloads it."""
    settings = run.optimizer
    for own in (Elementwise, Muon):
        if own not in ZERO_SUPPORTED_OPTIMIZERS:  # other kinds DeepSpeed refuses as untested
            ZERO_SUPPORTED_OPTIMIZERS.append(own)
    if settings.name == "muon":
        return Muon(groups, settings, run.seed, torch.bfloat16 if config["bf16"]["enabled"] else torch.float32)
    if settings.name == "lion" or states_of(settings).bf16:
        return Elementwise(groups, settings, run.seed)
    if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the learning rate of all groups of a DeepSpeed engine's optimizer, each times the group's own factor."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def attach_optimizer(engine: Any, run: RunConfig, layout: Layout) -> None:
    """Give a DeepSpeed engine the run's kind of masters; tell its optimizer which elements it has. Collective."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if run.optimizer.masters != "fp32":
        use_weights_as_masters(engine.optimizer)
    if isinstance(optimizer, Elementwise):
        optimizer.attach(engine, run.model, layout)


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
