"""From a folder of records to its analysis."""

from __future__ import annotations

from pathlib import Path

from llama_ds.perf.trace.analyse import Analysis, analyse
from llama_ds.perf.trace.kernels import Devices, Products, devices, products
from llama_ds.perf.trace.read import profiles, rank_files, read, read_profile, read_rank


def analyse_folder(folder: str | Path) -> Analysis:
    """Analyse what the ranks of a folder recorded, and their profiles. One rank is held in memory at a time.

    Raises:
        UserError: a file is missing, cut short, or of another recording.
    """
    files = rank_files(folder)
    found: dict[int, Products] = {}
    kernels: dict[int, Devices] = {}
    for rank, path in profiles(next(iter(files.values())).parent).items():
        if rank not in files:
            continue
        events = read_profile(path)
        if measured := products(events, str(read_rank(files[rank]).about["device"])):
            found[rank] = measured
        if seen := devices(events):
            kernels[rank] = seen
    return analyse(read(folder), found, kernels)
