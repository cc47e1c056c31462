"""The lock of a run while it trains, held by the first rank for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llama_ds.job.run_lock import lock_for_ranks
from llama_ds.parallel import world
from llama_ds.parallel.world import RankInfo


@contextmanager
def locked(run_dir: str, rank_info: RankInfo) -> Iterator[Callable[[], None]]:
    """Hold the lock of the run's folder; yield a check that no other job has taken it over. Collective.

    Raises:
        UserError: on all ranks: another job trains this run.
    """
    lock = world.together(lambda: lock_for_ranks(run_dir) if rank_info.rank == 0 else None)
    try:
        yield lock.check if lock else lambda: None
    finally:
        if lock:
            lock.release()
