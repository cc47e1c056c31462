"""A rank that dies ends the job: no rank keeps waiting, and the launcher returns a non-zero exit code."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import pytest
from launching import TIMEOUT_S, TRAIN, finish, kill_all, start, warm_deepspeed
from tiny_run import Run


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_the_job(rank: int, make_run: Callable[..., Run]) -> None:
    run = make_run(f"death_{rank}", {"parallel.pp": 2, "training.steps": 10**6})
    process = start(warm_deepspeed(2, TRAIN, run.file), run.log)
    try:
        wait_for_step(run)
        ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if TRAIN in p.cmdline()[:3]]
        victim = next(p for p in ranks if f"--local_rank={rank}" in p.cmdline())
        assert len(ranks) == 2
        victim.kill()
        done = finish(process, run.log)
    finally:
        kill_all(process)
    assert done.code != 0
    assert not [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def wait_for_step(run: Run) -> None:
    """Wait until the run has taken a step."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (run.dir / "metrics.jsonl").exists() or not run.metrics:
        assert time.monotonic() < deadline, run.log.read_text()
        time.sleep(0.05)
