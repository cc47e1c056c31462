"""Analysis of recorded steps: metrics and slow ranks, from the account of all ranks."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from llama_ds.perf.trace.account import Account, Step
from llama_ds.perf.trace.ideal import Ideal, ideal
from llama_ds.perf.trace.kernels import Devices, MeasuredProducts
from llama_ds.perf.trace.kinds import COMMUNICATION

MAX_REPORTED_RANKS = 5


@dataclass(frozen=True)
class SlowRank:
    """Compute time of a rank and the median of its stage, in milliseconds per step."""

    rank: int
    place: str
    own_ms: float
    median_ms: float


@dataclass(frozen=True)
class Analysis:
    """Breakdown of the time of all ranks and steps. `metrics` are in percent, named as in `kinds.METRICS`."""

    ranks: int
    steps: int
    step_ms: float
    metrics: dict[str, float | None]
    communication: dict[str, dict[str, float]]  # by kind: milliseconds per rank and step, exposed and in flight
    stages: list[float]  # mean compute time of a rank, by stage, in milliseconds per step
    slowest: list[SlowRank]
    ideal: Ideal
    clock_error_us: float | None  # None: the clocks were not compared
    products: dict[int, MeasuredProducts] = field(default_factory=dict)  # matrix products by profiled rank
    kernels: dict[int, Devices] = field(default_factory=dict)  # kernels by profiled rank


def analyse(found: Account, products: dict[int, MeasuredProducts], kernels: dict[int, Devices]) -> Analysis:
    """Return the analysis of the account of all ranks and the profiles of some. It modifies the account's steps."""
    steps = found.steps
    for step in steps:
        _close(step)
    transits = [time for step in steps for times in step.transits.values() for time in times]
    lengths = [step.end - step.begin for step in steps]
    total_time = sum(length * step.ranks for length, step in zip(lengths, steps, strict=True))
    sums = {key: sum(step.sums[key] for step in steps) for key in {key for step in steps for key in step.sums}}
    per_step = {rank: time / len(steps) / 1e3 for rank, time in found.compute.items()}
    stages, slowest = _stages(per_step, found.locations)
    communication = _communication(steps, sums, sum(step.ranks for step in steps))
    metrics = _shares(sums, total_time) | {
        f"hidden_{kind}": _hidden(communication[kind]) if kind in communication else None for kind in COMMUNICATION
    }
    reference = ideal(found.schedule, found.times, statistics.median(transits) if transits else 0.0)
    length = statistics.mean(lengths)
    measured = (metrics["bubble"] or 0.0) + (metrics["exposed_p2p"] or 0.0)
    metrics |= reference.lost(length, measured)
    metrics["imbalance"] = (max(stages) / statistics.mean(stages) - 1) * 100 if any(stages) else 0.0
    metrics["slowest"] = max(((s.own_ms / s.median_ms - 1) * 100 for s in slowest if s.median_ms), default=0.0)
    rates = [p.efficiency for p in products.values() if p.efficiency is not None]
    metrics["gemm"] = statistics.mean(rates) * 100 if rates else None
    for name in ("exposed_kernels", "idle_kernels"):
        shares = [getattr(d, name) * 100 for d in kernels.values()]
        metrics[name] = statistics.mean(shares) if shares else None
    compared = [error for error in found.errors if error is not None]
    return Analysis(
        ranks=len(found.compute),
        steps=len(steps),
        step_ms=length / 1e3,
        metrics=metrics,
        communication=communication,
        stages=stages,
        slowest=slowest[:MAX_REPORTED_RANKS],
        ideal=reference,
        clock_error_us=max(compared) if len(compared) == len(found.errors) else None,
        products=products,
        kernels=kernels,
    )


def _close(step: Step) -> None:
    """Split the waits for the norm at the last rank's arrival, and estimate the messages' time in flight."""
    last = max((begin for begin, _ in step.norms), default=0.0)
    for begin, end in step.norms:
        late = min(last - begin, end - begin)
        step.sums["bubble"] += late
        step.sums["exposed_agreement"] += end - begin - late
    step.sums["other"] += (step.end - step.begin) * step.ranks - step.within
    medians = {size: statistics.median(found) for size, found in step.transits.items()}
    step.in_flight["p2p"] = sum(medians.get(size, 0.0) * count for size, count in step.sent.items())


def _shares(sums: dict[str, float], total_time: float) -> dict[str, float | None]:
    """Return each kind's percentage of all ranks' time; together they are 100."""
    names = ("compute", "recompute", "optimizer", "data", "bubble", *(f"exposed_{kind}" for kind in COMMUNICATION))
    shares: dict[str, float | None] = {name: sums.get(name, 0.0) / total_time * 100 for name in (*names, "other")}
    shares["exposed"] = sum(shares[f"exposed_{kind}"] or 0.0 for kind in COMMUNICATION)
    return shares


def _communication(steps: Sequence[Step], sums: dict[str, float], count: int) -> dict[str, dict[str, float]]:
    """Return milliseconds per rank and step, for the kinds that occurred."""
    found = {}
    for kind in COMMUNICATION:
        exposed, in_flight = sums.get(f"exposed_{kind}", 0.0), sum(step.in_flight[kind] for step in steps)
        if exposed or in_flight:
            found[kind] = {"exposed_ms": exposed / count / 1e3, "under_way_ms": in_flight / count / 1e3}
    return found


def _hidden(times: dict[str, float]) -> float | None:
    """Return the hidden percentage of a kind's time in flight, or None if that time is unknown."""
    if not times["under_way_ms"]:
        return None
    return max(0.0, 1 - times["exposed_ms"] / times["under_way_ms"]) * 100


def _stages(compute: dict[int, float], locations: dict[int, tuple[int, str]]) -> tuple[list[float], list[SlowRank]]:
    """Return the stages' mean compute times, and the ranks sorted by their excess over their stage's median."""
    by_stage: dict[int, list[float]] = defaultdict(list)
    for rank, time in compute.items():
        by_stage[locations[rank][0]].append(time)
    medians = {stage: statistics.median(times) for stage, times in by_stage.items()}
    slow = [SlowRank(rank, locations[rank][1], time, medians[locations[rank][0]]) for rank, time in compute.items()]
    slow.sort(key=lambda s: s.median_ms - s.own_ms if len(compute) > len(by_stage) else -s.own_ms)
    return [statistics.mean(by_stage[stage]) for stage in sorted(by_stage)], slow
