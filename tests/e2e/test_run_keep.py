"""With --keep-ranks the ranks without a fault go on in the next attempt as the same processes, with the same losses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cluster import Job, start_here
from launching import TRAIN, forked, succeed
from tiny_run import Run

from llama_ds.experiments.goodput import LEAVE, goodput
from llama_ds.experiments.records import read_run

LAYOUT = {
    "parallel.pp": 2,
    "model.num_hidden_layers": 2,
    "training.steps": 60,
    "evaluation.rows": 0,
    "checkpoint.interval": 20,
}


@pytest.mark.slow
def test_healthy_ranks_outlive_two_killed_ones(make_run: Callable[..., Run], tmp_path: Path) -> None:
    """A rank is killed, then the first one, which hosts the store; each time only that one is a new process."""
    whole = make_run("kept_whole", LAYOUT)
    succeed(forked(4, TRAIN, whole.file), whole.log)
    memory = {"checkpoint.memory_interval": 1, "checkpoint.memory_folder": str(tmp_path)}
    run = make_run("kept", LAYOUT | memory)
    job = start_here(run, 4, "--supervise", "--keep-ranks", leave_s=60)  # a busy machine takes its time
    try:
        pids = []
        for attempt, victim in enumerate((3, 0), 1):
            job.wait_for_attempt(attempt)
            pids.append(ranks(job, attempt))
            os.kill(pids[-1][victim], 9)
        job.wait_for_attempt(3)
        pids.append(ranks(job, 3))
        code = job.finish()
    finally:
        job.kill()
    assert code == 0, job.output[-4000:]
    for before, after, victim, left in zip(pids[:-1], pids[1:], (3, 0), job.named("left"), strict=True):
        assert [rank for rank in range(4) if before[rank] != after[rank]] == [victim], job.output[-4000:]
        assert left["ranks"] == [rank for rank in range(4) if rank != victim]
        assert left["problems"] == {str(victim): "the fault is its own"}
    starts = job.named("attempt started")
    assert [event.get("kept") for event in starts] == [None, *(event["ranks"] for event in job.named("left"))]
    assert run.losses == whole.losses
    assert not job.left_running()
    accounts = goodput(read_run(str(run.dir)), 86400)
    assert accounts.phases[LEAVE] >= sum(event["seconds"] for event in job.named("left")) - 0.01


def ranks(job: Job, attempt: int) -> dict[int, int]:
    """Return the process ids of an attempt's ranks, as the supervisor finds them: by their environment."""
    folder = str(job.folder / f"attempt_{attempt:02d}")
    found = {}
    for process in psutil.Process(job.process.pid).children(recursive=True):
        shown = process.environ()
        if shown.get("LLAMA_DS_JOB") == folder and "RANK" in shown:
            assert f"@{folder}/arguments" in process.cmdline(), "ps shows the attempt too"
            found[int(shown["RANK"])] = process.pid
    return found
