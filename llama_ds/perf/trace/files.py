"""From a folder of records to its analysis: pipelines are read side by side, on all cores, and only sums come back."""

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

_FEW = 32  # ranks that are read before processes would have started
_SILENT_S = 5.0  # after which it is said how far it has come, and again


def analyse_folder(folder: str | Path) -> Analysis:
    """Analyse what the ranks of a folder recorded, and their profiles. A process holds one rank in memory at a time.

    Raises:
        UserError: a file is missing, cut short, or of another recording.
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
    if len(files) <= _FEW:
        return _sum(map(read, pipelines), len(pipelines))
    # Events are many and hold no cycles: garbage collection would walk them for nothing, a quarter of the time.
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
    said = time.monotonic()
    for number, more in enumerate(accounts, 2):
        found.add(more)
        if time.monotonic() > said + _SILENT_S:
            said = time.monotonic()
            print(f"read {number} of {count} pipelines", file=sys.stderr, flush=True)
    return found


def _pipeline(first: RankRecord, paths: list[Path]) -> Account:
    """Return the account of the ranks of one pipeline."""
    return account(_ranks(first, paths))


def _ranks(first: RankRecord, paths: list[Path]) -> Iterator[RankRecord]:
    places = set()
    for path in paths:
        rank = read_rank(path)
        check_alike(path, rank, first)
        places.add(rank.pipeline)
        if len(places) > 1:
            raise UserError(
                f"{path}: stands at {rank.place}, in another pipeline than {paths[0].name}; the files are of several "
                "recordings: record into an empty folder"
            )
        yield rank
