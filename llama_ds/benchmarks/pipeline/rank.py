"""One rank of a contest: `python -m llama_ds.benchmarks.pipeline.rank CONTEST.json FOLDER`, with RANK etc. set."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from llama_ds.benchmarks.pipeline.contest import Contest
from llama_ds.benchmarks.ranks import joined
from llama_ds.benchmarks.step import Step
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.layout.pipeline_schedule import describe_trace
from llama_ds.parallel import world
from llama_ds.training.engines.build import build_engine

WARMUP = 2  # untimed turns


def main() -> None:
    """Time the schedules in turns and record one step of each."""
    with joined(Contest) as (contest, folder, rank):
        engines, steps = {}, {}
        for schedule in contest.schedules:
            engines[schedule], steps[schedule] = _build(contest, schedule)
        times = _time(steps, contest.repeats)
        for schedule, engine in engines.items():
            run, layout = contest.contestant(schedule)
            world.barrier()
            engine.trace.start()
            steps[schedule]()
            about = {**describe_trace(run, layout, rank), "host": f"host{rank}", "device": "cpu"}
            about |= {"first_step": 1, "measured_steps": 1, "clock": [(0, 0, 0)]}  # network namespaces share the clock
            engine.trace.write(str(folder / schedule), rank, **about)
            engine.deepspeed.destroy()
        if rank == 0:
            (folder / "times.json").write_text(json.dumps(times))


def _build(contest: Contest, schedule: str) -> tuple[Any, Step]:
    """Return this rank's engine and a step function that uses the same rows every time."""
    run, layout = contest.contestant(schedule)
    engine = build_engine(run, layout, deepspeed_config(run, layout, bf16_native=True), torch.device("cpu"))
    shape = (contest.micro_batches, contest.micro_batch, run.data.seq_len + 1)
    rows = np.random.default_rng(engine.dp_rank).integers(0, run.model.vocab_size, shape)
    return engine, lambda: engine.read(engine.train_step(iter(rows), 1e-4))[0]


def _time(steps: Mapping[str, Step], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Return seconds and losses of every step, taken in turns; each step begins and ends with a barrier."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(WARMUP + repeats):
        for name, step in steps.items():
            world.barrier()
            start = time.perf_counter()
            losses[name].append(step())
            world.barrier()
            if repeat >= WARMUP:
                seconds[name].append(time.perf_counter() - start)
    return {"seconds": seconds, "losses": losses}


if __name__ == "__main__":
    main()
