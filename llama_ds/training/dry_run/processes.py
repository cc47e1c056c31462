"""Run each rank in a process of its own, forked after all imports, a few at a time."""

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
from llama_ds.training.dry_run.rank import DryRunTask, simulate_rank
from llama_ds.training.dry_run.report import RankReport


def simulate_ranks(task: DryRunTask, rank_infos: Sequence[RankInfo], jobs: int) -> list[RankReport]:
    """Return the reports of `rank_infos` in order; at most `jobs` processes run at a time.

    Raises:
        UserError: a rank raised it, as in training, or its process was killed.
        RuntimeError: a rank failed.
    """
    context: Any = multiprocessing.get_context("fork")
    todo = list(rank_infos)
    running: dict[Any, tuple[RankInfo, Any]] = {}
    done: dict[int, RankReport] = {}
    try:
        while todo or running:
            while todo and len(running) < jobs:
                rank_info = todo.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_run_rank, args=(task, rank_info, sender))
                process.start()
                sender.close()
                running[receiver] = rank_info, process
            for connection in wait(list(running)):
                rank_info, process = running.pop(connection)
                done[rank_info.rank] = _receive(connection, rank_info, process)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    return [done[rank_info.rank] for rank_info in rank_infos]


def _receive(connection: Any, rank_info: RankInfo, process: Any) -> RankReport:
    try:
        result = connection.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"the process of rank {rank_info.rank} was killed (exit code {process.exitcode}), possibly because memory "
            "ran out: a rank takes about half a GB; free some, or run fewer ranks at a time with --jobs 1"
        ) from None
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _run_rank(task: DryRunTask, rank_info: RankInfo, out: Connection) -> None:
    """Run one rank in this forked process and exit without the interpreter's shutdown."""
    gc.disable()  # a step creates millions of objects and few cycles
    log.setup(quiet=True)
    warnings.simplefilter("ignore")  # DeepSpeed calls deprecated names of torch
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)  # stdout is reserved for the report
    try:
        out.send(simulate_rank(task, rank_info))
    except UserError as error:
        out.send(error)
    except BaseException:
        import traceback

        out.send(RuntimeError(f"rank {rank_info.rank}:\n{traceback.format_exc()}"))
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(0)
