"""What this rank's optimizer holds of every weight, whichever of DeepSpeed's optimizers it is.

Under ZeRO a rank holds some elements of its tensor-parallel part of a weight: fp32 master and moments lie at one place
of as many flat buffers, one set for each optimizer group. Without ZeRO, and in fp32, each weight is its own master.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from llama_ds.layout.optimizer_states import MASTER, OptimizerStates
from llama_ds.layout.weights import weight_of


@dataclass(frozen=True)
class Fragment:
    """Elements `start` .. of this rank's tensor-parallel part of a weight, counted as they lie in its memory."""

    name: str  # of the parameter in the DeepSpeed engine
    start: int
    tensors: dict[str, Tensor]  # views (n,) of the optimizer's memory: MASTER, and moments once they are there

    @property
    def numel(self) -> int:
        """How many elements."""
        return self.tensors[MASTER].numel()


def fragments(engine: Any) -> Iterator[Fragment]:
    """Yield this rank's fragments. Moments are there after a step or `begin_moments`."""
    for parameter, name in engine.param_names.items():
        place = _place(engine, parameter)
        if place:
            master, begin, count, start = place
            state = _adam(engine).state[master]
            moments = {k: s for k, s in state.items() if isinstance(s, Tensor) and s.shape == master.shape}
            flats = {MASTER: master, **moments}
            views = {key: flat.detach().view(-1).narrow(0, begin, count) for key, flat in flats.items()}
            yield Fragment(name, start, views)


def begin_moments(engine: Any, steps: int, states: OptimizerStates) -> None:
    """Set the steps taken, and make room for the moments, whatever is in it, for what will be loaded."""
    adam = _adam(engine)
    for master, parameters in zip(_masters(engine), _groups(engine), strict=True):
        count = torch.tensor(float(steps), device=master.device) if isinstance(adam, torch.optim.AdamW) else steps
        state = adam.state[master]
        state["step"] = count
        (moments,) = {states.moments[weight_of(engine.param_names[p]).role] for p in parameters}
        for key in moments:
            if key not in state:
                state[key] = torch.zeros_like(master)


def adam_steps(engine: Any) -> int:
    """Return how many steps Adam has taken, which leaves out those that were not finite; 0 before the first.

    Synchronises with the device.
    """
    state = _adam(engine).state
    return next((int(state[master]["step"]) for master in _masters(engine) if state.get(master)), 0)


@torch.no_grad()
def spread_masters(engine: Any) -> None:
    """Make the weights that compute what the masters are, on all ranks. Collective."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        _spread_stage3(optimizer)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def _spread_stage3(optimizer: Any) -> None:
    for index, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.fp16_partitioned_groups_flat[index].copy_(master)
        group = optimizer.fp16_partitioned_groups[index]
        parts = optimizer.unflatten(optimizer.fp16_partitioned_groups_flat[index], group)
        for part, updated in zip(group, parts, strict=True):
            part.data = updated.data
    if optimizer.persistent_parameters:  # small ones, kept whole on every rank
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _place(engine: Any, parameter: nn.Parameter) -> tuple[Tensor, int, int, int] | None:
    """Return (master, where in it this weight's elements begin, how many, the first one's number in the weight)."""
    optimizer: Any = engine.optimizer
    zero3: Any = parameter
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        group, begin, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = torch.distributed.get_rank(zero3.ds_process_group) * length
        count = min(length, zero3.ds_numel - start)  # the last ranks' are padded
        return (optimizer.fp32_partitioned_groups_flat[group], begin, count, start) if count > 0 else None
    if hasattr(parameter, "_hp_mapping"):
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        address = mapping.hp_fragment_address
        master = _masters(engine)[mapping.param_group_index]
        return master, address.start, address.numel, mapping.lp_fragment_address.start
    return parameter, 0, parameter.numel(), 0


def _masters(engine: Any) -> list[Tensor]:
    """Return the flat buffers of the masters, by optimizer group; or the weights, which are their own."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    return list(engine.param_names)


def _groups(engine: Any) -> list[list[nn.Parameter]]:
    """Return the weights of each of `_masters`."""
    optimizer = engine.optimizer
    for name in ("fp16_groups", "bf16_groups", "bit16_groups"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    return [[parameter] for parameter in engine.param_names]


def _adam(engine: Any) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)
