"""One simulated rank: the trainer's own engine takes one step on fake tensors."""

from __future__ import annotations

import hashlib
import resource
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llama_ds.config.schema import RunConfig
from llama_ds.layout.layout import Layout
from llama_ds.layout.optimizer_states import states_of
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.layout.rank_memory import rank_memory
from llama_ds.layout.recompute import ELEMENT_BYTES, stage_policies
from llama_ds.parallel.dry_run.fake_world import fake_world
from llama_ds.parallel.dry_run.graphs import DryGraphs
from llama_ds.parallel.dry_run.holdings import parameter_counts, sort_holdings
from llama_ds.parallel.dry_run.ledger import (
    ACTIVATIONS,
    GRADIENTS,
    MATRICES,
    OPTIMIZER,
    WEIGHTS,
    WORKING,
    Call,
    Ledger,
)
from llama_ds.parallel.world import RankInfo
from llama_ds.training.dry_run.report import IssuedCall, ProcessGroup, RankReport
from llama_ds.training.engines.build import build_engine


@dataclass(frozen=True)
class DryRunTask:
    """What all ranks of a dry run share."""

    run: RunConfig
    layout: Layout
    config: dict[str, Any]  # the merged DeepSpeed configuration
    backend: str  # nccl or gloo: gradients are passed to them in different ways


def simulate_rank(task: DryRunTask, rank_info: RankInfo) -> RankReport:
    """Build the engine of one rank and take one optimizer step. Call it only once in a process."""
    started = time.perf_counter()
    run, layout = task.run, task.layout
    ledger, new_groups = Ledger(), hashlib.sha256()
    with fake_world(rank_info, task.backend, ledger, lambda ranks: new_groups.update(repr(ranks).encode())):
        engine = build_engine(run, layout, task.config, torch.device("cpu"), graphs=DryGraphs(ledger))
        sort_holdings(engine.deepspeed, ledger, states_of(run.optimizer))
        building = ledger.calls
        ledger.restart()
        batches = _Batches(layout.micro_batch, run.data.seq_len)
        result = engine.train_step(batches, run.optimizer.lr)
        engine.read(result)
        sharded, replicated = parameter_counts(engine.deepspeed)
        inner = engine.deepspeed
        batch = (inner.train_batch_size(), inner.gradient_accumulation_steps(), inner.dp_world_size)
    groups: dict[ProcessGroup, int] = {}
    element_bytes = ELEMENT_BYTES["bf16" if task.config["bf16"]["enabled"] else "fp32"]
    coords = layout.coords(rank_info.rank)
    if engine.dp_rank != coords.dp:
        raise AssertionError(f"rank {rank_info.rank} is data-parallel rank {engine.dp_rank}, not {coords.dp}")
    return RankReport(
        rank=rank_info.rank,
        coords=coords,
        stages=stages_of(run, layout, coords.pp),
        parameters_sharded=sharded,
        parameters_replicated=replicated,
        memory=_at_peak(ledger),
        matrices=ledger.most_matrices,
        planned_matrices=rank_memory(run, layout, element_bytes)[coords.pp].matrices,
        planned=planned_memory(run, layout, element_bytes, coords.pp),
        building=_traffic(building, groups),
        step=_traffic(ledger.calls, groups),
        groups=list(groups),
        new_groups=new_groups.hexdigest(),
        micro_batches=batches.count,
        engine_batch=batch,
        reads_data=engine.reads_data,
        seconds=time.perf_counter() - started,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def stages_of(run: RunConfig, layout: Layout, pp_rank: int) -> list[int]:
    """Return the pipeline stages that a rank holds."""
    placement = schedule_of(run, layout).placement
    return [placement.stage(pp_rank, chunk) for chunk in range(placement.chunks)]


def _at_peak(ledger: Ledger) -> dict[str, int]:
    """Return the memory at the peak by category; Muon's matrices are working memory."""
    peak = Counter(ledger.peak)
    peak[WORKING] += peak.pop(MATRICES, 0)
    return {category: size for category, size in peak.items() if size}


def planned_memory(run: RunConfig, layout: Layout, element_bytes: int, pp_rank: int) -> dict[str, int]:
    """Return the memory of a rank at its planned peak by category; empty unless ZeRO-1, the only stage planned here."""
    if run.zero_stage != 1:
        return {}
    held = rank_memory(run, layout, element_bytes)[pp_rank]
    stages = stage_policies(run, layout, element_bytes)
    kept = sum(stages[stage].saved_bytes for stage in stages_of(run, layout, pp_rank))
    in_muon = held.in_muon(kept) > kept + held.working
    return {
        WEIGHTS: held.weights,
        GRADIENTS: held.gradients,
        OPTIMIZER: held.optimizer,
        ACTIVATIONS: 0 if in_muon and not held.graphed else kept,
        WORKING: held.matrices if in_muon else held.working,
    }


class _Batches:
    """Yields dummy micro-batches and counts them."""

    def __init__(self, rows: int, seq_len: int) -> None:
        self.count = 0
        self._batch = np.zeros((rows, seq_len + 1), np.int32)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        self.count += 1
        return self._batch


def _traffic(calls: list[Call], groups: dict[ProcessGroup, int]) -> list[IssuedCall]:
    """Return the calls with indices for their groups; add new groups to `groups`."""
    return [
        IssuedCall(
            call.kind, groups.setdefault(ProcessGroup(call.name, call.group), len(groups)), call.peer, call.bytes
        )
        for call in calls
    ]
