"""Converts the files of a contest to plain data and a table."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_ds.benchmarks.pipeline.contest import Contest
from llama_ds.perf.trace.files import analyse_folder
from llama_ds.perf.trace.report import table

SETTINGS = (
    "pp",
    "tp",
    "dp",
    "micro_batches",
    "micro_batch",
    "dtype",
    "recompute",
    "rate_mbit",
    "delay_ms",
    "repeats",
    "pass_times",
    "steps",
    "pace",
)
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}  # relative, for the first losses


def report(contest: Contest, folder: Path) -> tuple[dict[str, Any], str]:
    """Return the results in `folder` as plain data and as readable text."""
    found = json.loads((folder / "times.json").read_text())
    first = {name: losses[0] for name, losses in found["losses"].items()}
    if max(first.values()) - min(first.values()) > LOSS_TOLERANCE[contest.dtype] * max(first.values()):
        raise AssertionError(f"the schedules compute different losses: {first}")
    analyses = {name: analyse_folder(folder / name) for name in contest.schedules}
    median = {name: statistics.median(times) for name, times in found["seconds"].items()}
    over = {name: median[name] / median[contest.schedules[0]] for name in contest.schedules}
    run, _ = contest.contestant(contest.schedules[0])
    paced = contest.micro_batches * sum(contest.pace or [0.0]) / 1e3
    idle = {name: {"idle_over_pace": 1 - paced / median[name]} if paced else {} for name in median}
    results = {
        "settings": {name: getattr(contest, name) for name in SETTINGS},
        "model": asdict(run.model),
        "seq_len": run.data.seq_len,
        "cores": os.cpu_count(),
        **({"late_passes": found["late_passes"]} if paced else {}),
        "steps": {
            name: {
                "median_s": median[name],
                "min_s": min(found["seconds"][name]),
                "max_s": max(found["seconds"][name]),
                "over_first": over[name],
                "step_ms": analyses[name].step_ms,
                **({"pass_times": times} if (times := analyses[name].ideal.pass_times) else {}),
                **idle[name],
                **analyses[name].metrics,
            }
            for name in contest.schedules
        },
    }
    rate = f"links of {contest.rate_mbit:g} Mbit/s and {contest.delay_ms:g} ms" if contest.rate_mbit else "loopback"
    lines = [
        f"pp {contest.pp} tp {contest.tp} dp {contest.dp}, {contest.micro_batches} micro-batches of "
        f"{contest.micro_batch} x {run.data.seq_len}, hidden {run.model.hidden_size}, "
        f"{run.model.num_hidden_layers} layers, {contest.dtype}, {rate}, {os.cpu_count()} cores, median of "
        f"{contest.repeats}",
        *(
            f"{name:14} {median[name] * 1e3:8.1f} ms per step, {over[name]:.3f} x {contest.schedules[0]}; bubble "
            f"simulated with the measured times {analyses[name].ideal.bubble:.1%}"
            + (f"; outside of its passes a rank spends {idle[name]['idle_over_pace']:.1%}" if paced else "")
            for name in contest.schedules
        ),
        *([f"{found['late_passes']:.2%} of the passes took longer than their pace"] if paced else []),
        "one turn of each schedule, as shares of all ranks' time:",
        table(analyses),
    ]
    return results, "\n".join(lines)
