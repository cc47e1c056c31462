"""The change of a run that takes least time among those that free enough memory, for a rank that has run out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.recompute import GIB, POLICIES, parse
from llama_ds.config.row_stages import STAGE_SIZES, first_step, stage_index
from llama_ds.config.rules import check
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError, listed
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.layout.recompute import stage_policies
from llama_ds.perf.plan.memory import Memory, run_memory


@dataclass(frozen=True)
class Relief:
    """A setting of the run, and the bytes that the plan's fullest rank holds less with it."""

    setting: str
    saves: float


def planned_memory(run: RunConfig, layout: Layout, element_bytes: int) -> list[Memory]:
    """Return the planned memory of each pipeline rank in tensors, without a margin for the device."""
    return run_memory(run, layout, stage_policies(run, layout, element_bytes), 0, element_bytes)


def check_matrices(run: RunConfig, layout: Layout, element_bytes: int, device_bytes: int) -> None:
    """Check that each stage can hold Muon's whole matrices beside weights, gradients and states.

    Raises:
        UserError: a device of `device_bytes` is too small for them.
    """
    if run.optimizer.name != "muon":
        return
    needed = [memory.with_matrices for memory in planned_memory(run, layout, element_bytes)]
    rank = max(range(layout.pp), key=lambda r: needed[r])
    if needed[rank] <= device_bytes:
        return
    missing = int(needed[rank]) - device_bytes
    found = relief(run, layout, element_bytes, missing, attrgetter("with_matrices"))
    fix = "use more ranks or larger devices"
    if found is not None:
        more = "" if found.saves >= missing else ", which alone is not enough: use more ranks or larger devices too"
        fix = f"use {found.setting}, planned to need {found.saves / GIB:.2f} GiB less{more}"
    raise UserError(
        f"{run.path}: optimizer.name = muon: stage {_stages(run, layout, rank)} cannot hold whole matrices: its step "
        f"needs {needed[rank] / GIB:.2f} GiB of a rank, with weights, gradients and states, and the device has "
        f"{device_bytes / GIB:.2f} GiB; {fix}"
    )


def _stages(run: RunConfig, layout: Layout, rank: int) -> str:
    placement = schedule_of(run, layout).placement
    return listed([placement.stage(rank, chunk) for chunk in range(placement.chunks)])


def relief(
    run: RunConfig,
    layout: Layout,
    element_bytes: int,
    missing: int,
    size: Callable[[Memory], float] = attrgetter("total"),
) -> Relief | None:
    """Return the cheapest setting that is planned to free `missing` bytes on the fullest rank.

    Where none does, it is the one that frees most; None if the run's rules allow no further one.

    Args:
        size: the bytes of a rank that are too many.
    """

    def most(run: RunConfig, layout: Layout) -> float:
        return max(map(size, planned_memory(run, layout, element_bytes)))

    before = most(run, layout)
    found: list[Relief] = []
    for setting, candidate in _by_cost(run, layout):
        try:
            check(candidate)
            changed = resolve_layout(candidate, layout.world)
            deepspeed_config(candidate, changed, element_bytes == 2)
            saves = before - most(candidate, changed)
        except UserError:
            continue
        if saves >= max(missing, 1):
            return Relief(setting, saves)
        found.append(Relief(setting, saves))
    best = max(found, key=lambda one: one.saves, default=None)
    return best if best and best.saves > 0 else None


def _by_cost(run: RunConfig, layout: Layout) -> Iterator[tuple[str, RunConfig]]:
    """Yield settings with the run that has them: first what costs no time, last what communicates most."""
    parallel = run.parallel

    def set_to(**values: Any) -> tuple[str, RunConfig]:
        words = " ".join(f"{_key(run, key)}={str(value).lower()}" for key, value in values.items())
        # An explicit partition is one of other stages.
        partition = None if {"pp", "tp"} & values.keys() else parallel.partition
        return words, replace(run, parallel=replace(parallel, **{"partition": partition, **values}))

    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield set_to(sequence_parallel=True)
    if parallel.joint_weight_gradients > 1:
        yield set_to(joint_weight_gradients=1)
    if parallel.cuda_graphs:
        yield set_to(cuda_graphs=False)
    if parallel.post_validation:  # without the second copy of masters and moments
        yield set_to(post_validation=False)
    zero = run.zero_stage
    for stage in range(zero + 1, 4 if parallel.pp == 1 else 2):
        if layout.data_axis > 1 and stage < 3:
            yield _with_zero(run, stage)
    for policy in _stronger(parallel.recompute):
        yield set_to(recompute=policy)
    for size in range(parallel.micro_batch // 2, 0, -1):
        if parallel.micro_batch % size == 0:
            yield set_to(micro_batch=size)
    if layout.data_axis > 1 and parallel.pp == 1 and zero < 3:
        yield _with_zero(run, 3)
    yield set_to(cp=2 * parallel.cp)
    yield set_to(tp=2 * parallel.tp, sequence_parallel=True)
    yield set_to(pp=2 * parallel.pp)


def _key(run: RunConfig, key: str) -> str:
    """Return where the run file sets a key of `parallel`: in the stage that the run holds, if stages state it."""
    if run.data.stages and key in STAGE_SIZES:
        return f"data.stages.{stage_index(run, first_step(run))}.{key}"
    return f"parallel.{key}"


def _with_zero(run: RunConfig, stage: int) -> tuple[str, RunConfig]:
    block = run.deepspeed.get("zero_optimization", {}) | {"stage": stage}
    return (
        f"deepspeed.zero_optimization.stage={stage}",
        replace(run, deepspeed=run.deepspeed | {"zero_optimization": block}),
    )


def _stronger(recompute: str) -> tuple[str, ...]:
    """Return the save policies that save less than the weakest of the run's."""
    wanted = parse(recompute)
    if wanted is None or not wanted.policies:  # by a budget, which may not reach full recompute
        return POLICIES[-1:]
    return POLICIES[1 + min(map(POLICIES.index, wanted.policies)) :]
