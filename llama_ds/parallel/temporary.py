"""Engines and worlds that a rank uses for a moment, without a trace in what it does afterwards."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.zero import parameter_offload, partition_parameters
from deepspeed.utils import groups
from torch.distributed import distributed_c10d

# Modules of DeepSpeed that keep process groups, buffers and modules of the engine built last in global variables.
_STATEFUL = (groups, p2p, checkpointing, partition_parameters, parameter_offload)
PART_TIMEOUT = timedelta(seconds=60)  # limit for a collective in a part of the world


@contextmanager
def engines_undone() -> Iterator[None]:
    """Undo what engines built inside change in this process: groups, DeepSpeed's globals, generators, frozen garbage.

    Dismantle them inside. All ranks must leave it alike.
    """
    before = set(distributed_c10d._world.pg_map)
    undo = process_state()
    try:
        yield
    finally:
        undo()
        # DeepSpeed's engines are cyclic garbage, which the freeze before the optimizer has excepted from collection.
        gc.unfreeze()
        gc.collect()
        if dist.is_initialized():
            for group in [group for group in distributed_c10d._world.pg_map if group not in before]:
                dist.destroy_process_group(group)
        if torch.cuda.is_initialized():
            if "torch._dynamo" in sys.modules:  # forget kernels and guards for the small shapes
                torch._dynamo.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def dismantle(engine: Any) -> None:
    """Destroy a DeepSpeed engine and what it hangs on its parameters and modules.

    Under ZeRO-3 the optimizer holds autograd's nodes, which hold the parameters, which hold the optimizer: a cycle
    through C++ that Python's collector does not see. Hooks of the modules hold the optimizer's coordinator of gathers,
    which holds the parameters, too, and caches of its methods hold the modules.
    """
    optimizer, module = engine.optimizer, engine.module
    offload = getattr(optimizer, "parameter_offload", None)
    parameters, modules = list(module.parameters()), list(module.modules())
    engine.destroy()
    coordinator = getattr(offload, "param_coordinator", None)
    _clear_caches(type(coordinator))
    for owner in (offload, coordinator, optimizer):
        if owner is not None:
            vars(owner).clear()
    for parameter in parameters:
        vars(parameter).clear()
        parameter._backward_hooks = None  # they refer to it, through C++, too
    for part in modules:
        vars(part).clear()


def _clear_caches(owner: type) -> None:
    """Clear the caches of a class's methods, each of which DeepSpeed has wrapped in a closure."""
    for method in vars(owner).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def process_state(more: Sequence[ModuleType] = ()) -> Callable[[], None]:
    """Return a function that restores DeepSpeed's globals, the variables of `more` modules, and all generators."""
    restore = [*(_globals_of(module) for module in (*_STATEFUL, *more)), _generators()]

    def undo() -> None:
        for one in restore:
            one()

    return undo


def _globals_of(module: ModuleType) -> Callable[[], None]:
    """Return a function that restores the module's variables; containers keep their identity."""
    kept = {
        name: (value, _copied(value))
        for name, value in vars(module).items()
        if not name.startswith("__") and not callable(value) and not isinstance(value, ModuleType)
    }

    def restore() -> None:
        for name, (value, content) in kept.items():
            if isinstance(value, (dict, list)):
                value.clear()
                value.update(content) if isinstance(value, dict) else value.extend(content)
            setattr(module, name, value)

    return restore


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list)) else value


def _generators() -> Callable[[], None]:
    """Return a function that restores the states of all generators of random numbers."""
    on_host, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    on_device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore() -> None:
        torch.set_rng_state(on_host)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device)

    return restore


@contextmanager
def part_of_world(ranks: Sequence[int], name: str) -> Iterator[None]:
    """Make `ranks`, which include this one, the whole world for a moment. Collective: every rank names its part.

    All process groups end with it; afterwards the job's world is joined anew. `name` is new in each use.
    """
    store, world = distributed_c10d._get_default_store(), dist.get_world_size()
    rank, backend = dist.get_rank(), dist.get_backend()
    _rejoin(backend, store, f"{name}/{ranks[0]}", ranks.index(rank), len(ranks), PART_TIMEOUT, world)
    try:
        yield
    finally:
        _rejoin(backend, store, f"{name}/whole", rank, world, distributed_c10d.default_pg_timeout, world)


def _rejoin(
    backend: str, store: dist.Store, name: str, rank: int, size: int, timeout: timedelta, everyone: int
) -> None:
    """Leave the present world once every rank has finished with it, and join one of `size` ranks."""
    key = f"{name.partition('/')[0]}/left {name.endswith('/whole')}"
    if store.add(key, 1) == everyone:
        store.set(f"{key} by all", "")
    store.wait([f"{key} by all"])
    dist.destroy_process_group()
    joined = dist.PrefixStore(name, store)
    dist.init_process_group(backend, store=joined, rank=rank, world_size=size, timeout=timeout)
