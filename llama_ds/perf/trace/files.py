"""Analyses a folder of records. Worker processes read the pipelines in parallel and return only sums."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from llama_ds.child_processes import without_interrupts
from llama_ds.errors import UserError
from llama_ds.layout.axes import Axes
from llama_ds.perf.trace.account import Account, account
from llama_ds.perf.trace.analyse import Analysis, analyse
from llama_ds.perf.trace.kernels import Devices, MeasuredProducts, devices, products
from llama_ds.perf.trace.read import RankRecord, check_alike, profiles, rank_files, read_profile, read_rank

_MAX_IN_PROCESS = 32  # ranks; reading so few is faster than starting worker processes
_PROGRESS_S = 5.0  # interval between progress lines


def analyse_folder(folder: str | Path) -> Analysis:
    """Analyse the records and profiles in a folder. Each process holds one rank in memory at a time.

    Raises:
        UserError: A file is missing, truncated, or from another recording.
    """
    files = rank_files(folder)
    first = replace(read_rank(next(iter(files.values()))), events=[])
    found: dict[int, MeasuredProducts] = {}
    kernels: dict[int, Devices] = {}
    for rank, path in profiles(files[first.rank].parent).items():
        if rank not in files:
            continue
        events = read_profile(path)
        if measured := products(events, str(read_rank(files[rank]).about["device"])):
            found[rank] = measured
        if seen := devices(events):
            kernels[rank] = seen
    return analyse(_all(files, first), found, kernels)


def _all(files: dict[int, Path], first: RankRecord) -> Account:
    """Return the account of all ranks."""
    pp = first.about["pp"]
    pipelines = [[files[rank] for rank in group] for group in Axes(pp=pp, dp=len(files) // pp).groups("pp")]
    read = partial(_pipeline, first)
    if len(files) <= _MAX_IN_PROCESS:
        return _sum(map(read, pipelines), len(pipelines))
    # The events are many and have no reference cycles; garbage collection would waste a quarter of the time on them.
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(pipelines)), initializer=gc.disable) as processes:
        try:
            with without_interrupts():
                accounts = processes.map(read, pipelines)
            return _sum(accounts, len(pipelines))
        except BaseException:
            processes.shutdown(cancel_futures=True)
            raise


def _sum(accounts: Iterator[Account], count: int) -> Account:
    found = next(accounts)
    reported = time.monotonic()
    for number, more in enumerate(accounts, 2):
        found.add(more)
        if time.monotonic() > reported + _PROGRESS_S:
            reported = time.monotonic()
            print(f"read {number} of {count} pipelines", file=sys.stderr, flush=True)
    return found


def _pipeline(first: RankRecord, paths: list[Path]) -> Account:
    """Return the account of the ranks of one pipeline."""
    return account(_ranks(first, paths))


def _ranks(first: RankRecord, paths: list[Path]) -> Iterator[RankRecord]:
    pipelines = set()
    for path in paths:
        rank = read_rank(path)
        check_alike(path, rank, first)
        pipelines.add(rank.pipeline)
        if len(pipelines) > 1:
            raise UserError(
                f"{path}: rank at {rank.location} is in another pipeline than {paths[0].name}; the files are from "
                "several recordings: record into an empty folder"
            )
        yield rank
