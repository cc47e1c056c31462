"""Validation of the planner: its predictions for measured runs, and their errors."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
# Shares of the measured runs left out at either end, the first that suffices.
_LEFT_OUT = (0.1, 0.075, 0.05, 0.025, 0.01, 0.0)


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
    found: dict[str, int] = defaultdict(int)
    for row in rows:
        if row.job is not None and row.gpu in machines:
            for text in row.assumed:
                found[text] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


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

    A source counts as much as another, however many runs it has. An interval leaves out as much at either end as it
    may, so that on average over the sources four of five runs lie in the interval that the other sources give, and four
    of five of all runs in their own.
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


def _interval(by_source: Mapping[str, list[float]]) -> Interval:
    for left_out in _LEFT_OUT:
        inside = 0.0
        for source, values in by_source.items():
            others = {name: own for name, own in by_source.items() if name != source}
            low, high = _ends(others, left_out) if others else (0.0, 0.0)
            inside += sum(low <= value <= high for value in values) / len(values)
        low, high = _ends(by_source, left_out)
        runs = [low <= value <= high for values in by_source.values() for value in values]
        if inside >= _INSIDE * len(by_source) and sum(runs) >= _INSIDE * len(runs):
            break
    return Interval(*_ends(by_source, left_out), sum(map(len, by_source.values())), inside / len(by_source))


def _ends(by_source: Mapping[str, list[float]], left_out: float) -> tuple[float, float]:
    """Return the values that leave out this share of the sources' weight at either end."""
    points = sorted((value, 1 / len(values)) for values in by_source.values() for value in values)
    ends = []
    for ordered in (points, points[::-1]):
        weight = 0.0
        for value, share in ordered:
            weight += share
            if weight >= left_out * len(by_source):
                ends.append(value)
                break
    return ends[0], ends[1]


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
