"""A uniform view of the optimizer state that this rank holds of every weight, for all of DeepSpeed's optimizers.

Under ZeRO a rank holds some elements of its tensor-parallel shard of a weight: fp32 master and moments have the same
offset in their flat buffers, one set per optimizer group. Without ZeRO in fp32, each weight is its own master.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from llama_ds.layout.optimizer_states import MASTER, OptimizerStates
from llama_ds.layout.weights import weight_of

# master, offset of this rank's elements of a weight in it, their count, number of the first one in the weight's shard
Location = tuple[Tensor, int, int, int]


@dataclass(frozen=True)
class Fragment:
    """Elements from number `start` on of this rank's tensor-parallel shard of a weight, in memory order."""

    name: str  # name of the parameter in the DeepSpeed engine
    start: int
    tensors: dict[str, Tensor]  # views (n,) of the optimizer's memory: MASTER, and moments once allocated

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.tensors[MASTER].numel()


def fragments(engine: Any) -> Iterator[Fragment]:
    """Yield this rank's fragments. They have moments after a step or `begin_moments`."""
    for _, name, (master, begin, count, start) in located(engine):
        state = _adam(engine).state[master]
        moments = {k: s for k, s in state.items() if isinstance(s, Tensor) and s.shape == master.shape}
        flats = {MASTER: master, **moments}
        views = {key: flat.detach().view(-1).narrow(0, begin, count) for key, flat in flats.items()}
        yield Fragment(name, start, views)


def flat_states(engine: Any) -> Iterator[Tensor]:
    """Yield this rank's whole masters and moments as the optimizer holds them, always in the same order."""
    for master in _masters(engine):
        state = _adam(engine).state[master]
        yield master.detach()
        yield from (state[key] for key in sorted(state) if isinstance(state[key], Tensor) and state[key].dim())


def located(engine: Any) -> Iterator[tuple[nn.Parameter, str, Location]]:
    """Yield the weights of which this rank has elements: (parameter, its name in the engine, where they are)."""
    for parameter, name in engine.param_names.items():
        location = _locate(engine, parameter)
        if location:
            yield parameter, name, location


def flat_groups(engine: Any, ranks: int) -> Iterator[tuple[Tensor, list[tuple[str, int, list[tuple[int, int]]]]]]:
    """Yield each master with its weights: (name, begin, ranges).

    `begin` is where this rank's elements begin in the master. `ranges` has for each of the `ranks` data-parallel ranks
    the first element that it holds of its tensor-parallel part of the weight, and the end. They follow from how
    DeepSpeed cuts its buffers; that this rank's own are as it says is checked.
    """
    for index, (master, parameters) in enumerate(zip(_masters(engine), _groups(engine), strict=True)):
        found = []
        for parameter, ranges in _ranges(engine, index, master, parameters, ranks):
            location = _locate(engine, parameter)
            _, begin, count, start = location or (master, 0, 0, 0)
            own = ranges[engine.mpu.get_data_parallel_rank() if ranks > 1 else 0]
            if own[1] - own[0] != count or (count and own[0] != start):
                raise AssertionError(f"{engine.param_names[parameter]}: {own} is not where DeepSpeed has {location}")
            found.append((engine.param_names[parameter], begin, ranges))
        yield master, found


def _ranges(
    engine: Any, index: int, master: Tensor, parameters: list[nn.Parameter], ranks: int
) -> Iterator[tuple[nn.Parameter, list[tuple[int, int]]]]:
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for parameter in parameters:
            zero3: Any = parameter
            _, _, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            ends = [min(rank * length, zero3.ds_numel) for rank in range(ranks + 1)]
            yield parameter, list(pairwise(ends))
    elif hasattr(parameters[0], "_hp_mapping"):
        orders = getattr(optimizer, "round_robin_bit16_groups", None) or _groups(engine)
        size, before = master.numel(), 0
        for parameter in orders[index]:
            numel = parameter.numel()
            ends = [min(max(rank * size - before, 0), numel) for rank in range(ranks + 1)]
            yield parameter, list(pairwise(ends))
            before += numel
    else:
        for parameter in parameters:
            yield parameter, [(0, parameter.numel())] * ranks


def begin_moments(engine: Any, steps: int, states: OptimizerStates) -> None:
    """Set the number of steps taken, and allocate moments into which a checkpoint can be loaded."""
    adam = _adam(engine)
    for master, parameters in zip(_masters(engine), _groups(engine), strict=True):
        count = torch.tensor(float(steps), device=master.device) if isinstance(adam, torch.optim.AdamW) else steps
        state = adam.state[master]
        state["step"] = count
        (moments,) = {states.moments[weight_of(engine.param_names[p]).role] for p in parameters}
        for key in moments:
            if key not in state:
                state[key] = torch.zeros_like(master, dtype=getattr(torch, states.dtype_name(key)))


def adam_steps(engine: Any) -> int:
    """Return the number of steps that Adam has taken, without skipped non-finite ones; 0 before the first.

    Synchronises with the device.
    """
    return int(step_counter(engine))


def step_counter(engine: Any) -> Tensor | int:
    """Return the count of steps of `adam_steps` as the optimizer holds it, which may be on the device."""
    state = _adam(engine).state
    counts: Iterator[Tensor | int] = (state[master]["step"] for master in _masters(engine) if state.get(master))
    return next(counts, 0)


def set_counts(engine: Any, step: int, taken: int) -> None:
    """Continue a DeepSpeed engine's counts after `step`, of which the optimizer has taken all but the skipped ones."""
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()
    engine.skipped_steps = step - taken


@torch.no_grad()
def spread_masters(engine: Any) -> None:
    """Copy the masters into the weights that compute, on all ranks. Collective."""
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
    if optimizer.persistent_parameters:  # small parameters, which every rank holds in full
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer.invalidate_secondary_tensor()  # hpZ keeps a copy of the weights within a host, and gathers from it
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _locate(engine: Any, parameter: nn.Parameter) -> Location | None:
    """Return where this rank's elements of a weight are, None if it has none."""
    optimizer: Any = engine.optimizer
    zero3: Any = parameter
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        group, begin, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = torch.distributed.get_rank(zero3.ds_process_group) * length
        count = min(length, zero3.ds_numel - start)  # the last ranks' parts are padded
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
    """Return the flat buffers of the masters by optimizer group, or the weights if they are their own masters."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    return list(engine.param_names)


def _groups(engine: Any) -> list[list[nn.Parameter]]:
    """Return the weights of each entry of `_masters`."""
    optimizer = engine.optimizer
    for name in ("fp16_groups", "bf16_groups", "bit16_groups"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    return [[parameter] for parameter in engine.param_names]


def _adam(engine: Any) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)
