"""Runs the ranks of a contest."""

from __future__ import annotations

from pathlib import Path

from llama_ds.benchmarks.pipeline.contest import Contest
from llama_ds.benchmarks.ranks import start_ranks


def run_contest(contest: Contest, folder: Path) -> None:
    """Run all ranks; they write times.json and a folder of records for each schedule to `folder`.

    Raises:
        UserError: a rank failed; the message has the end of its log.
    """
    module = "llama_ds.benchmarks.pipeline.rank"
    start_ranks(module, contest, folder, contest.world, contest.rate_mbit, contest.delay_ms)
