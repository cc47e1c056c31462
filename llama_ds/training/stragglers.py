"""Reports stragglers, the ranks and hosts for which all others wait, every `logging.straggler_interval` steps.

Each rank accumulates the parts of its steps (`llama_ds.parallel.step_times`). One gather brings the means and medians
of all ranks together. The first rank finds the outliers (`llama_ds.training.outliers`), reports them and writes a line
to stragglers.jsonl with the medians of every stage and the parts of the slow ranks.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from llama_ds.config.schema import RunConfig
from llama_ds.layout.layout import Layout
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.layout.rank_map import spans
from llama_ds.log import logger
from llama_ds.parallel import world
from llama_ds.parallel.step_times import PARTS
from llama_ds.parallel.trace import Trace
from llama_ds.training.outliers import Outliers, SlowLink, SlowRanks, find
from llama_ds.training.run_log import drop_steps_after

FILE = "stragglers.jsonl"
MAX_CONSOLE_LINES = 8  # stragglers.jsonl has them all
LABELS = ("waiting for data", "compute", "", "", "", "optimizer", "between steps")  # labels for the PARTS in OWN


class Stragglers:
    """Times this rank's steps and contributes to the report, which the first rank writes."""

    def __init__(
        self,
        run: RunConfig,
        layout: Layout,
        rank_info: world.RankInfo,
        host: str,
        trace: Trace,
        device: torch.device,
        first: int,
    ) -> None:
        """`host` is the name of this rank's host in messages; the run begins after step `first`. Collective."""
        self._every, self._trace, self._device = run.logging.straggler_interval, trace, device
        self._layout, self._one_way = layout, schedule_of(run, layout).chunks == 1
        self._active = rank_info.rank == 0
        self._path = os.path.join(run.run_dir, FILE)
        self._hosts = world.gather(host) if self._every else []
        if self._every and self._active:
            drop_steps_after(self._path, first)

    def before_step(self) -> None:
        """Start timing a step, unless it is traced."""
        if self._trace.recording:
            self._trace.times.pause()
        elif self._every:
            self._trace.times.begin()

    def after_step(self, done: int) -> list[str]:
        """Stop timing a step; return the lines of the report if one is due after `done` steps. Collective."""
        times = self._trace.times
        if times.counting:
            times.end()
        if not self._every or done % self._every:
            return []
        steps = times.take()
        parts = [steps.mean(0), np.median(steps, 0)] if len(steps) else np.zeros((2, len(PARTS)))
        ranks = world.gather_numbers([len(steps), *np.rint(np.concatenate(parts)).astype(int).tolist()], self._device)
        if not self._active or not ranks[:, 0].all():
            return []
        mean, median = np.split(ranks[:, 1:] / 1e3, 2, 1)  # milliseconds
        layout = self._layout
        found = find(mean, median, (layout.pp, layout.data_axis, layout.tp), self._one_way)
        self._write(record(done, int(ranks[0, 0]), found, mean, self._hosts))
        return lines(found, self._hosts)

    def _write(self, values: dict[str, Any]) -> None:
        try:
            with open(self._path, "a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:  # a full disk does not stop the run
            logger.warning("%s: cannot write step %s (%s); the run continues", self._path, values["step"], error)


def record(done: int, steps: int, found: Outliers, mean: np.ndarray, hosts: list[str]) -> dict[str, Any]:
    """Return the values of one line of the file, for the `steps` steps up to `done`; times are ms per step."""
    return {
        "step": done,
        "steps": steps,
        "step_ms": round(found.step, 3),
        "stages": [_parts(row) for row in found.medians],
        "slow": [
            {
                "part": PARTS[slow.part],
                "ranks": list(slow.ranks),
                "host": hosts[slow.ranks[0]],
                "stage": slow.stage,
                "ms": round(slow.time, 3),
                "median_ms": round(slow.median, 3),
                "steady": slow.steady,
                "parts": _parts(mean[list(slow.ranks)].mean(0)),
            }
            for slow in found.slow
        ],
        "slow_links": [
            {"ranks": link.ranks.ravel().tolist(), "after_stage": link.after, "ms": round(link.time, 3)}
            for link in found.links
        ],
    }


def lines(found: Outliers, hosts: list[str]) -> list[str]:
    """Return the report for the console, worst first; empty if no rank is slow."""
    by_host: dict[tuple[int, str], list[SlowRanks]] = defaultdict(list)
    for slow in found.slow:
        by_host[slow.part, hosts[slow.ranks[0]]].append(slow)
    worst = sorted(by_host.values(), key=lambda group: -max(map(_excess, group)))
    ranks_on = Counter(hosts)
    report = [_slow_line(group, hosts, ranks_on, found.step) for group in worst]
    report += [_link_line(link, hosts, found.step) for link in found.links]
    more = [f"SLOW: {len(report) - MAX_CONSOLE_LINES} more, see {FILE}"] if len(report) > MAX_CONSOLE_LINES else []
    return [*report[:MAX_CONSOLE_LINES], *more]


def _slow_line(group: list[SlowRanks], hosts: list[str], ranks_on: Counter[str], step: float) -> str:
    """Name the host if most of its ranks are slow, else the ranks."""
    ranks = [rank for slow in group for rank in slow.ranks]
    worst = max(group, key=_excess)
    host = hosts[ranks[0]]
    host_is_slow = len(ranks_on) > 1 and len(ranks) > 1 and 2 * len(ranks) > ranks_on[host]
    named = f"SLOW HOST: {host} ({_ranks(ranks)})" if host_is_slow else f"SLOW: {_ranks(ranks)} on {host}"
    more = _excess(worst)
    steadily = "" if worst.steady else ", only in a few of the steps"
    return (
        f"{named}: {LABELS[worst.part]} {worst.time:.0f} ms a step, the median of its stage is {worst.median:.0f} ms: "
        f"{more:.0f} ms ({more / step:.0%} of the step) for which all ranks wait{steadily}"
    )


def _link_line(link: SlowLink, hosts: list[str], step: float) -> str:
    ends = link.ranks if link.after is None else link.ranks[link.after : link.after + 2]
    where = " and ".join(
        f"{_ranks(stage)} on {', '.join(dict.fromkeys(hosts[rank] for rank in stage))}" for stage in ends.tolist()
    )
    return (
        f"SLOW LINK: between {where}: their pipeline waits {link.time:.0f} ms a step ({link.time / step:.0%} of "
        "the step) longer for messages than the others, and none of its ranks computes longer"
    )


def _excess(slow: SlowRanks) -> float:
    return slow.time - slow.median


def _parts(times: np.ndarray) -> dict[str, float]:
    return {f"{part}_ms": round(float(time), 3) for part, time in zip(PARTS, times, strict=True)}


def _ranks(ranks: Iterable[int]) -> str:
    """Return the ranks in short form: "ranks 0-3, 8"."""
    distinct = set(ranks)
    return f"rank{'s' if len(distinct) > 1 else ''} {spans(distinct).replace(',', ', ')}"
