"""Times training steps of several layouts on the ranks of a job, to validate the planner's predictions.

The steps are the trainer's, on random rows, without data reading, reports or checkpoints.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.log import logger
from llama_ds.parallel import world
from llama_ds.training.engines.build import build_engine

LEARNING_RATE = 1e-5
WARM_UP = 2  # untimed steps of each engine


def measure(request: dict[str, Any], rank_info: world.RankInfo, device: torch.device) -> dict[str, Any]:
    """Return the seconds of all timed steps of every layout, the loss of its first step and its memory. Collective.

    Layouts are built and timed in turns, `rounds` times, so that load on the machine affects all of them alike.
    """
    found: list[dict[str, Any]] = [{"overrides": words, "seconds": [], "losses": []} for words in request["layouts"]]
    for turn in range(request["rounds"]):
        for one in found:
            run = load_run(request["run"], one["overrides"])
            layout = resolve_layout(run, rank_info.world)
            logger.info("round %d of %d: %s", turn + 1, request["rounds"], " ".join(one["overrides"]) or "as it is")
            seconds, loss, one["memory"] = _steps(run, layout, request["steps"], device)
            one["seconds"] += seconds
            one["losses"].append(loss)
    return {"layouts": found}


def _steps(
    run: RunConfig, layout: Layout, steps: int, device: torch.device
) -> tuple[list[float], float, dict[str, float] | None]:
    """Return the seconds of each timed step on the slowest rank, the first step's loss, and `measured_memory`."""
    forget_memory(device)
    engine = build_engine(run, layout, deepspeed_config(run, layout, world.computes_bf16(device)), device)
    shape = (layout.dp, layout.accumulation, layout.micro_batch, run.data.seq_len + 1)
    rows = np.random.default_rng(run.seed).integers(0, run.model.vocab_size, shape)[engine.dp_rank]
    seconds, first = [], 0.0
    for step in range(WARM_UP + steps):
        world.barrier()
        begin = time.perf_counter()
        loss, _ = engine.read(engine.train_step(iter(rows), LEARNING_RATE))
        world.barrier()
        first = loss if step == 0 else first
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - begin)
    memory = measured_memory(device)
    engine.deepspeed.destroy()
    slowest = world.maximum(seconds, device)
    return slowest, first, memory


def forget_memory(device: torch.device) -> None:
    """Let the peaks of a CUDA device begin anew, without blocks that an earlier engine has left."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measured_memory(device: torch.device) -> dict[str, float] | None:
    """Return bytes of the fullest rank's device, None on a CPU. Collective.

    `allocated` is the peak of tensors, `reserved` that of the caching allocator, with fragments, and `outside` what the
    driver, NCCL and other programs hold.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    peaks: list[float] = [
        torch.cuda.max_memory_allocated(device),
        torch.cuda.max_memory_reserved(device),
        outside,
        total,
    ]
    return dict(zip(("allocated", "reserved", "outside", "device"), world.maximum(peaks, device), strict=True))
