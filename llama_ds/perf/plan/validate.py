"""Validation of the planner: its predictions for measured runs, and their errors."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product

from llama_ds.config.context_parallel import NODE_RANKS
from llama_ds.config.recompute import GIB
from llama_ds.layout.flops import parameter_count
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import StepJob
from llama_ds.perf.plan.likely import SPANS, Interval, kind
from llama_ds.perf.plan.memory import needed_memory, published_memory
from llama_ds.perf.plan.rank_spread import expected_maximum
from llama_ds.perf.plan.rows import Row, group_of
from llama_ds.perf.plan.step import step_time

_INSIDE = 0.8  # share of the runs of an unseen source that an interval should hold
_LEFT_OUT = tuple(n / 80 for n in range(17))  # shares of the measured runs that may be left out at either end


@dataclass(frozen=True)
class Fits:
    """Whether runs ran or were out of memory, and whether the planner says so."""

    ran: int
    said_to_fit: int  # among those that ran
    failed: int
    said_to_fail: int  # among the others

    @property
    def agreement(self) -> float:
        """Share of all runs about which the planner is right."""
        return (self.said_to_fit + self.said_to_fail) / (self.ran + self.failed)


@dataclass(frozen=True)
class Checked:
    """A row and the planner's prediction for it, in the row's unit."""

    row: Row
    predicted: float

    @property
    def error(self) -> float:
        """Relative error: predicted / measured - 1."""
        return self.predicted / self.row.value - 1


def check(rows: Iterable[Row], machines: Mapping[str, Hardware]) -> tuple[list[Checked], dict[str, int]]:
    """Return the predictions for all rows with a job on a described machine, and the skipped rows by reason.

    Rows that were out of memory have no number to predict; `fits` judges them.
    """
    found: list[Checked] = []
    skipped: dict[str, int] = defaultdict(int)
    for row in rows:
        if row.job is None:
            skipped[row.skipped] += 1
        elif row.gpu not in machines:
            skipped[f"no description of {row.gpu}"] += 1
        elif math.isfinite(row.value):
            found.append(Checked(row, predict(row, machines[row.gpu])))
    return found, dict(skipped)


def fits(rows: Iterable[Row], machines: Mapping[str, Hardware]) -> Fits | None:
    """Return what the planner says of runs whose memory is known to suffice or not; None without any.

    A run that was measured has had enough memory. What the caching allocator and the driver take is counted.
    """
    found: dict[bool, list[bool]] = {True: [], False: []}
    for row in rows:
        if row.job is not None and row.gpu in machines and row.job.whole_model:
            found[math.isfinite(row.value)].append(needed_memory(row.job) <= machines[row.gpu].memory_bytes)
    if not (found[True] or found[False]):
        return None
    return Fits(len(found[True]), sum(found[True]), len(found[False]), found[False].count(False))


def assumptions(rows: Iterable[Row], machines: Mapping[str, Hardware]) -> dict[str, int]:
    """Return what is assumed because rows do not state it, and for how many of those that are compared."""
    compared = (row for row in rows if row.job is not None and row.gpu in machines)
    return dict(Counter(text for row in compared for text in row.assumed).most_common())


def predict(row: Row, gpu: Hardware) -> float:
    """Return the planner's prediction for the row."""
    assert row.job is not None
    gpu = gpu.with_links(*row.links, row.node_ranks)
    if row.kind == "peak_mem_gib":
        return published_memory(row.job, row.reserved) / GIB
    step = step_time(gpu, row.job)
    if row.kind == "iteration_s":
        return step.seconds
    if row.kind == "tokens_per_s_per_gpu":
        return step.tokens_per_second
    rate = step.tokens_per_second * stated_flops(row.job, hardware=row.kind in ("hfu_pct", "tflops_per_gpu_hw"))
    return rate / 1e12 if row.kind.startswith("tflops") else 100 * rate / gpu.peak


def measured_spread(rows: Iterable[Row], machines: Mapping[str, Hardware]) -> dict[str, float]:
    """Return the spread of ranks' step times that each series of runs shows, by the name of its first run.

    The runs of a series have the same work for each rank and differ in the number of data-parallel ranks, at least
    three. What they take longer than predicted without a spread is fitted to the expected maximum over their ranks.
    """
    series: dict[StepJob, list[tuple[float, float, str]]] = defaultdict(list)
    for row in rows:
        if row.job and row.gpu in machines and row.kind != "peak_mem_gib" and math.isfinite(row.value):
            uniform = predict(row, replace(machines[row.gpu], rank_spread=0.0))
            slower = row.value / uniform if row.kind == "iteration_s" else uniform / row.value
            waited = expected_maximum(max(row.job.ranks, machines[row.gpu].links.gpus_per_node))
            alike = replace(row.job, axes=replace(row.job.axes, dp=1))
            series[alike].append((waited, math.log(slower), row.id))
    found = {}
    for runs in series.values():
        waits = [wait for wait, _, _ in runs]
        if len(set(waits)) >= 3:
            found[runs[0][2]] = statistics.linear_regression(waits, [log for _, log, _ in runs]).slope
    return found


def stated_flops(job: StepJob, hardware: bool) -> float:
    """Return FLOPs per token as the sources count them: 6 N + 12 L D T, attention not halved by causality.

    Hardware FLOPs are 4/3 of that with full recompute; with selective recompute, attention counts twice (Korthikanti,
    equation 8).
    """
    model = job.model
    parameters = parameter_count(model)
    if not job.program.gated:
        parameters -= model.num_hidden_layers * model.hidden_size * model.intermediate_size
        parameters -= 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size  # a lookup has no FLOPs
    attention = 12.0 * model.num_hidden_layers * model.hidden_size * job.seq_len
    if not hardware:
        return 6 * parameters + attention
    policy = job.stages[0][0][0]
    if policy == "full":
        return 4 / 3 * (6 * parameters + attention)
    return 6 * parameters + attention * (2 if policy == "selective" else 1)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the `share` quantile of the values, with linear interpolation."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spans(checked: Iterable[Checked]) -> dict[tuple[bool, bool], Interval]:
    """Return the intervals of `likely.SPANS` from the A100 runs among these.

    A source counts as much as another, however many runs it has. An interval is the shortest, by the shares that it
    leaves out at either end, for which on average over the sources four of five runs lie in the interval that the other
    sources give, and four of five of all runs in their own.
    """
    found: dict[tuple[bool, bool], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, source, faster in _speeds(checked):
        found[key][source].append(faster)
    return {key: _interval(by_source) for key, by_source in found.items()}


def likely_runs(checked: Iterable[Checked]) -> tuple[int, int]:
    """Return the A100 runs whose speed lies in the interval that `search` gives (`likely.SPANS`), and all A100 runs."""
    inside = [SPANS[key].low <= faster <= SPANS[key].high for key, _, faster in _speeds(checked)]
    return sum(inside), len(inside)


def _speeds(checked: Iterable[Checked]) -> Iterator[tuple[tuple[bool, bool], str, float]]:
    """Yield (kind, source, measured over predicted speed) of each run on A100s."""
    for item in checked:
        job = item.row.job
        if item.row.kind != "peak_mem_gib" and item.row.gpu.startswith("a100") and job and job.whole_model:
            slower = item.predicted / item.row.value
            faster = slower if item.row.kind == "iteration_s" else 1 / slower
            yield kind(job, item.row.node_ranks or NODE_RANKS), group_of(item.row.source), faster


def _interval(by_source: Mapping[str, Sequence[float]]) -> Interval:
    values = {name: sorted(own) for name, own in by_source.items()}
    every = sorted(value for own in values.values() for value in own)
    others = {name: _bounds({n: own for n, own in values.items() if n != name}) for name in values if len(values) > 1}
    own, best = _bounds(values), Interval(every[0], every[-1], len(every), 0.0)
    for below, above in product(range(len(_LEFT_OUT)), repeat=2):
        bounds = {name: (lows[below], highs[above]) for name, (lows, highs) in others.items()}
        covered = statistics.mean(_inside(values[name], *bounds.get(name, (0.0, 0.0))) for name in values)
        found = Interval(own[0][below], own[1][above], len(every), covered)
        enough = covered >= _INSIDE and _inside(every, found.low, found.high) >= _INSIDE
        if enough and found.high / found.low < best.high / best.low:
            best = found
    return best


def _inside(ordered: Sequence[float], low: float, high: float) -> float:
    return max(0, bisect_right(ordered, high) - bisect_left(ordered, low)) / len(ordered)


def _bounds(by_source: Mapping[str, Sequence[float]]) -> tuple[list[float], list[float]]:
    """Return the values that leave out each of `_LEFT_OUT` of the sources' weight, below and above them."""
    points = sorted((value, 1 / len(values)) for values in by_source.values() for value in values)
    found = []
    for ordered in (points, points[::-1]):
        weights = list(accumulate(weight for _, weight in ordered))
        places = (bisect_left(weights, share * len(by_source)) for share in _LEFT_OUT)
        found.append([ordered[place][0] for place in places])
    return found[0], found[1]


def summary(checked: Sequence[Checked]) -> dict[str, float]:
    """Return the count, median and 90th percentile of |error|, and the median of the error with its sign."""
    errors = [abs(item.error) for item in checked]
    return {
        "rows": len(errors),
        "median": statistics.median(errors),
        "p90": quantile(errors, 0.9),
        "bias": statistics.median(item.error for item in checked),
    }


def groups(checked: Iterable[Checked]) -> dict[str, list[Checked]]:
    """Return the rows grouped by source, machine, and time or memory."""
    found: dict[str, list[Checked]] = defaultdict(list)
    for item in checked:
        what = "memory" if item.row.kind == "peak_mem_gib" else "time"
        found[f"{group_of(item.row.source)} | {item.row.gpu} | {what}"].append(item)
    return dict(sorted(found.items()))
