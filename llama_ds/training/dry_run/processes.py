"""A process for each rank, forked when everything is imported, a few at a time."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from llama_ds import log
from llama_ds.errors import UserError
from llama_ds.parallel.world import RankInfo
from llama_ds.training.dry_run.rank import DryRunTask, dry_rank
from llama_ds.training.dry_run.report import RankReport


def dry_ranks(task: DryRunTask, places: Sequence[RankInfo], jobs: int) -> list[RankReport]:
    """Return the reports of `places` in their order; `jobs` processes run at a time.

    Raises:
        UserError: a rank's, as the trainer raises it, or its process was killed.
        RuntimeError: a rank failed.
    """
    context: Any = multiprocessing.get_context("fork")
    todo = list(places)
    running: dict[Any, tuple[RankInfo, Any]] = {}
    done: dict[int, RankReport] = {}
    try:
        while todo or running:
            while todo and len(running) < jobs:
                place = todo.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_be_rank, args=(task, place, theirs))
                process.start()
                theirs.close()
                running[ours] = place, process
            for connection in wait(list(running)):
                place, process = running.pop(connection)
                done[place.rank] = _receive(connection, place, process)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    return [done[place.rank] for place in places]


def _receive(connection: Any, place: RankInfo, process: Any) -> RankReport:
    try:
        result = connection.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"the process that was rank {place.rank} was ended from outside (code {process.exitcode}), maybe for its "
            "memory, of which a rank takes about half a GB; free some, or run fewer at a time with --jobs 1"
        ) from None
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _be_rank(task: DryRunTask, place: RankInfo, out: Connection) -> None:
    """Run in a process of its own, which ends without the interpreter's shutdown."""
    gc.disable()  # a step makes millions of objects and few cycles
    log.setup(quiet=True)
    warnings.simplefilter("ignore")  # DeepSpeed calls what torch has renamed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # stdout belongs to the report
    try:
        out.send(dry_rank(task, place))
    except UserError as error:
        out.send(error)
    except BaseException:
        import traceback

        out.send(RuntimeError(f"rank {place.rank}:\n{traceback.format_exc()}"))
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(0)
