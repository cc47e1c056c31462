"""One rank of a contest: `python -m llama_ds.benchmarks.pipeline.rank CONTEST.json FOLDER`, with RANK etc. set."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from llama_ds.benchmarks.pipeline.contest import Contest
from llama_ds.benchmarks.pipeline.pace import Pace, pass_seconds
from llama_ds.benchmarks.ranks import joined
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.layout.pipeline_schedule import describe_trace
from llama_ds.parallel import world
from llama_ds.parallel.pipeline_optimizer import PipelineOptimizer
from llama_ds.training.engines.build import build_engine

Turn = Callable[[], list[float]]  # takes the steps of a turn; returns their losses
WARMUP = 2  # untimed steps


def main() -> None:
    """Time the schedules in turns and record one turn of each."""
    with joined(Contest) as (contest, folder, rank):
        engines, turns, paces = {}, {}, []
        for schedule in contest.schedules:
            engines[schedule], turns[schedule] = _build(contest, schedule)
            if contest.pace:
                chunks = contest.contestant(schedule)[0].parallel.virtual_stages
                paces.append(Pace(engines[schedule].trace, pass_seconds(contest.pace, chunks)))
        times = _time(turns, contest.repeats, contest.steps)
        counts = [float(sum(pace.late for pace in paces)), float(sum(pace.passes for pace in paces))]
        late, passes = world.total(counts, torch.device("cpu"))
        for schedule, engine in engines.items():
            run, layout = contest.contestant(schedule)
            world.barrier()
            engine.trace.start(contest.steps)
            turns[schedule]()
            about = {**describe_trace(run, layout, rank), "host": f"host{rank}", "device": "cpu"}
            about |= {"first_step": 1, "measured_steps": contest.steps}
            about |= {"clock": [(0, 0, 0)]}  # network namespaces share the clock
            engine.trace.write(str(folder / schedule), rank, **about)
            engine.deepspeed.destroy()
        if rank == 0:
            late_share = {"late_passes": late / passes} if passes else {}
            (folder / "times.json").write_text(json.dumps(times | late_share))


def _build(contest: Contest, schedule: str) -> tuple[Any, Turn]:
    """Return this rank's engine and a function that takes the steps of a turn, with the same rows every time."""
    run, layout = contest.contestant(schedule)
    engine = build_engine(run, layout, deepspeed_config(run, layout, bf16_native=True), torch.device("cpu"))
    shape = (contest.micro_batches, contest.micro_batch, run.data.seq_len + 1)
    rows = np.random.default_rng(engine.dp_rank).integers(0, run.model.vocab_size, shape)

    optimizer = engine.deepspeed.optimizer

    def turn() -> list[float]:
        results = [engine.train_step(iter(rows), 1e-4) for _ in range(contest.steps)]
        losses = [engine.read(result)[0] for result in reversed(results)][::-1]  # reading the last one settles it
        if isinstance(optimizer, PipelineOptimizer):
            optimizer.finish()  # its weights would travel in the next schedule's turn
        return losses

    return engine, turn


def _time(turns: Mapping[str, Turn], repeats: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Return seconds of a step in every turn, and all losses; a turn begins and ends with a barrier."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    losses: dict[str, list[float]] = {name: [] for name in turns}
    warmup = -(-WARMUP // steps)
    for repeat in range(warmup + repeats):
        for name, turn in turns.items():
            world.barrier()
            start = time.perf_counter()
            losses[name] += turn()
            world.barrier()
            if repeat >= warmup:
                seconds[name].append((time.perf_counter() - start) / steps)
    return {"seconds": seconds, "losses": losses}


if __name__ == "__main__":
    main()
