"""Preparation for the first step: device memory, data, restored state."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from llama_ds.checkpoint.manifest import Description
from llama_ds.checkpoint.store import newest, step_of
from llama_ds.checkpoint.weights import ModelFiles
from llama_ds.config.context_parallel import HIERARCHICAL, check_context_parallel, cp_sizes
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.recompute import AUTO
from llama_ds.config.row_stages import at_stage, stage_index, stage_runs
from llama_ds.config.schema import RunConfig
from llama_ds.data.mixture import state_from_json
from llama_ds.data.source.shards import check_present
from llama_ds.data.sources import open_sources
from llama_ds.data.stream import Dataset, open_data
from llama_ds.errors import UserError
from llama_ds.layout.cp_traffic import cp_traffic, sent_bytes
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.layout.recompute import ELEMENT_BYTES, with_device_memory
from llama_ds.log import logger
from llama_ds.parallel import world
from llama_ds.schedules.zero_bubble_v import V_SCHEDULES
from llama_ds.training.checkpoints import Checkpoints
from llama_ds.training.engines.interface import Engine
from llama_ds.training.memory_checkpoints import MemoryCheckpoints
from llama_ds.training.plan import memory_table
from llama_ds.training.resumed import changes
from llama_ds.training.start import check_same_tokenizer

# Tag and description of the checkpoint to resume from, if any. Of a state in memory the tag is that of the newest
# checkpoint, "" without one.
Chosen = tuple[str, Description] | None


def choose_state(checkpoints: Checkpoints, memory: MemoryCheckpoints) -> Chosen:
    """Return the state to resume from: in the memory of the hosts if it is newer than any on disk. Collective.

    Raises:
        UserError: as `Checkpoints.choose`.
    """
    tag = world.gather(newest(checkpoints.folder) or "" if world.is_first() else "")[0]
    newest_step = step_of(tag) if tag else 0
    if found := memory.find(newest_step):
        checkpoints.adopt(found)
        return tag, found
    chosen = checkpoints.choose()
    older = step_of(chosen[0]) if chosen else 0
    if older < newest_step and (found := memory.find(older)):  # newer checkpoints on disk are damaged
        checkpoints.adopt(found)
        return chosen[0] if chosen else "", found
    return chosen


def with_min_memory(run: RunConfig, device: torch.device) -> RunConfig:
    """Return the run with `recompute: auto` resolved for the job's smallest device memory. Collective."""
    smallest = -int(world.maximum([-float(world.device_memory(device))], device)[0])
    return with_device_memory(run, smallest)


def stage_setup(
    run: RunConfig, chosen: Chosen, ranks: int, device: torch.device
) -> tuple[RunConfig, Layout, dict[str, Any]]:
    """Return the run as the stage after the chosen checkpoint trains it, its layout and its DeepSpeed configuration.

    Raises:
        UserError: the data of a later stage cannot be used.
    """
    step = chosen[1].step if chosen else 0
    stage = at_stage(run, step)
    for later in stage_runs(run)[stage_index(run, step) + 1 :]:
        open_sources(later.data, later.model.vocab_size)
    layout = resolve_layout(stage, ranks)
    return stage, layout, deepspeed_config(stage, layout, world.computes_bf16(device))


def check_same_order(run: RunConfig, layout: Layout) -> None:
    """Check that all ranks derive the same order of computations. Collective for a zero-bubble V, which computes it.

    Raises:
        UserError: they differ, so that ranks would wait for messages that nobody sends.
    """
    schedule = schedule_of(run, layout)
    if schedule.name not in V_SCHEDULES:
        return
    orders = [[(s.op.value, s.chunk, s.micro_batch) for s in schedule.instructions(r)] for r in range(schedule.ranks)]
    found = world.gather(zlib.crc32(repr(orders).encode()))
    other = next((rank for rank, own in enumerate(found) if own != found[0]), None)
    if other is not None:
        raise UserError(
            f"{run.path}: parallel.schedule = {schedule.name}: ranks 0 and {other} derive different "
            "orders of computations; start all ranks with the same run file and version of llama_ds"
        )


def with_cp_method(run: RunConfig, hosts: Sequence[str], dtype: str) -> RunConfig:
    """Return the run with `cp_method` resolved; `hosts` are those of all ranks, in order."""
    if run.parallel.cp == 1:
        return run
    sizes, reason = cp_sizes(run, min(Counter(hosts).values()))
    logger.info("context parallelism: %s over %d ranks, %s", sizes.words(), sizes.ranks, reason)
    model, parallel = run.model, run.parallel
    heads, kv_heads = model.num_attention_heads // parallel.tp, model.num_key_value_heads // parallel.tp
    tokens = parallel.micro_batch * run.data.seq_len // sizes.ranks
    traffic = cp_traffic(sizes, tokens, heads, kv_heads, model.head_dim)
    forward, backward = (size / 2**20 for size in sent_bytes(sizes, traffic, ELEMENT_BYTES[dtype]))
    logger.info("each rank sends %.3g MiB forward and %.3g MiB backward, of a layer and micro-batch", forward, backward)
    groups = sizes.all_to_all if sizes.method == HIERARCHICAL else 0
    run = replace(run, parallel=replace(run.parallel, cp_method=sizes.method, cp_all_to_all=groups))
    check_context_parallel(run)  # rules before the launch assume hosts of eight ranks
    return run


def open_train_data(run: RunConfig, checkpoints: str, chosen: Chosen, rank_info: world.RankInfo) -> Dataset:
    """Open the data at the chosen checkpoint of the folder `checkpoints`, or at the start."""
    if not chosen:
        data = open_data(run)
    else:
        folder = os.path.join(checkpoints, chosen[0])
        data = open_data(run, state_from_json(chosen[1].data, folder), chosen[1].step, folder)
        if rank_info.local_rank == 0:
            check_same_tokenizer(folder, data.sources.tokenizer)
    if rank_info.local_rank == 0:  # once per node, as with checkpoint files
        for source in data.sources.train:
            check_present(source)
    for source in data.sources.train:
        if filler := source.geometry.filler(source.seq_len):
            labels = source.rows * source.seq_len
            logger.info(
                "source %s: %d of %d labels are filler after its last document, without loss",
                source.name,
                filler,
                labels,
            )
    return data


def load_state(
    engine: Engine, checkpoints: Checkpoints, memory: MemoryCheckpoints, chosen: Chosen, start: ModelFiles | None
) -> int:
    """Load the chosen state, or the weights of `start`; return the number of finished steps. Collective."""
    checkpoints.products = engine.context.products
    if memory.found:
        assert chosen
        checkpoints.products.load(chosen[1].fp8_history, world.device())
        return memory.load(engine.deepspeed)
    if chosen:
        return checkpoints.load(engine.deepspeed, *chosen)
    if start:
        checkpoints.start_from(engine.deepspeed, start.finest)
    return 0


def log_start(run: RunConfig, layout: Layout, dtype: str, steps: range, chosen: Chosen) -> None:
    """Log the first of the `steps` that remain, and what differs from the checkpoint that it resumes from.

    Under `recompute: auto` also the memory plan of every stage.
    """
    if run.parallel.recompute.startswith(AUTO):
        for line in memory_table(run, layout, ELEMENT_BYTES[dtype]):
            logger.info("%s", line)
    logger.info("%s at step %d of %d", "resumed" if chosen else "starting", steps.start, run.training.steps)
    if chosen:
        for line in changes(run, layout, dtype, *chosen):
            logger.info("changed since %s: %s", chosen[0], line)
    if not steps:
        key = "training.steps" if steps.stop == run.training.steps else "checkpoint.stop_at"
        logger.info("no steps are left: %s = %d", key, steps.stop)
