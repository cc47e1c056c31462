"""The lock of a run while it trains, held by the first rank for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llama_ds.job.folder import VARIABLE
from llama_ds.job.run_lock import LAUNCHER, RANKS, RunLock, in_use, living_holder
from llama_ds.parallel import world
from llama_ds.parallel.world import RankInfo


@contextmanager
def locked(run_dir: str, rank_info: RankInfo) -> Iterator[Callable[[], None]]:
    """Hold the lock of the run's folder; yield a check that no other job has taken it over. Collective.

    Raises:
        UserError: on all ranks: another job trains this run.
    """
    attempt = os.environ.get(VARIABLE, "")
    job = os.path.dirname(attempt)
    lock = RunLock(run_dir, RANKS, job, attempt) if rank_info.rank == 0 else None
    world.together(lambda: _acquire(lock, run_dir, job) if lock else None)
    try:
        yield lock.check if lock else lambda: None
    finally:
        if lock:
            lock.release()


def _acquire(lock: RunLock, run_dir: str, job: str) -> None:
    lock.acquire()
    launcher = living_holder(run_dir, LAUNCHER, job)  # another job, whose ranks may be about to start again
    if launcher:
        lock.release()
        raise in_use(run_dir, launcher)
