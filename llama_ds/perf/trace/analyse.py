"""Where the time of recorded steps went: one pass over the ranks, then sums.

A rank computes, or waits. Waiting for a message counts as exposed communication from when both it waits and the
message has been sent; before that the sender was not ready, and the wait is bubble. Likewise the wait for the norm is
bubble until the last rank has come to it. Other waits count whole: they too are longer where another rank is late.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_ds.perf.trace.ideal import Ideal, Times, ideal
from llama_ds.perf.trace.kernels import Devices, Products
from llama_ds.perf.trace.kinds import COMMUNICATION, COMPUTE, MESSAGES, RECOMPUTE, SENDS, UNDER_WAY, WAITS
from llama_ds.perf.trace.read import Event, Rank
from llama_ds.perf.trace.spans import own_times, total

MOST_RANKS = 5  # that are named
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Slow:
    """A rank by its own computing, in milliseconds a step, beside the median of its stage."""

    rank: int
    place: str
    own_ms: float
    median_ms: float


@dataclass(frozen=True)
class Analysis:
    """Where the time of all ranks and steps went. `metrics` are percent, by the names of `kinds.METRICS`."""

    ranks: int
    steps: int
    step_ms: float
    metrics: dict[str, float | None]
    communication: dict[str, dict[str, float]]  # by kind: milliseconds of a rank and step, exposed and under way
    stages: list[float]  # a rank's own computing, milliseconds a step
    slowest: list[Slow]
    ideal: Ideal
    clock_error_us: float | None  # None: clocks were not compared
    products: dict[int, Products] = field(default_factory=dict)  # of profiled ranks
    kernels: dict[int, Devices] = field(default_factory=dict)


@dataclass
class _Step:
    """What is summed over ranks of one step."""

    begin: float = float("inf")
    end: float = float("-inf")
    ranks: int = 0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # microseconds
    under_way: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    sent: dict[Key, Event] = field(default_factory=dict)
    awaited: list[tuple[Key, Event]] = field(default_factory=list)
    norms: list[Event] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)  # the step on each rank


def analyse(
    ranks: Iterable[Rank], products: dict[int, Products] | None = None, kernels: dict[int, Devices] | None = None
) -> Analysis:
    """Return where the time of the ranks' steps went; profiles of some of them say more."""
    steps: list[_Step] = []
    own: dict[int, float] = {}
    places: dict[int, tuple[int, str]] = {}
    times, about, errors, world = Times(), None, [], 0
    for rank in ranks:
        about, world = about or rank, world + 1
        places[rank.rank] = rank.pp_rank, rank.place
        errors.append(rank.clock.error)
        found = rank.steps()[: rank.about["measured_steps"]]
        steps += [_Step() for _ in range(len(found) - len(steps))]
        own[rank.rank] = sum(_add(step, rank, *recorded, times) for step, recorded in zip(steps, found, strict=False))
    assert about
    transits = [t for step in steps for t in _split_waits(step)]
    lengths = [step.end - step.begin for step in steps]
    whole = sum(length * step.ranks for length, step in zip(lengths, steps, strict=True))
    sums = {key: sum(step.sums[key] for step in steps) for key in {key for step in steps for key in step.sums}}
    per_step = {rank: time / len(steps) / 1e3 for rank, time in own.items()}
    stages, slowest = _stages(per_step, places)
    communication = _communication(steps, sums, sum(step.ranks for step in steps))
    metrics = _shares(sums, whole) | {
        f"hidden_{kind}": _hidden(communication[kind]) if kind in communication else None for kind in COMMUNICATION
    }
    reference = ideal(about.schedule, times, statistics.median(transits) if transits else 0.0)
    length = statistics.mean(lengths)
    measured = (metrics["bubble"] or 0.0) + (metrics["exposed_p2p"] or 0.0)
    metrics |= reference.lost(length, measured)
    metrics["imbalance"] = (max(stages) / statistics.mean(stages) - 1) * 100 if any(stages) else 0.0
    metrics["slowest"] = max(((s.own_ms / s.median_ms - 1) * 100 for s in slowest if s.median_ms), default=0.0)
    products, kernels = products or {}, kernels or {}
    rates = [p.efficiency for p in products.values() if p.efficiency is not None]
    metrics["gemm"] = statistics.mean(rates) * 100 if rates else None
    for name in ("exposed_kernels", "idle_kernels"):
        shares = [getattr(d, name) * 100 for d in kernels.values()]
        metrics[name] = statistics.mean(shares) if shares else None
    compared = [error for error in errors if error is not None]
    return Analysis(
        ranks=world,
        steps=len(steps),
        step_ms=length / 1e3,
        metrics=metrics,
        communication=communication,
        stages=stages,
        slowest=slowest[:MOST_RANKS],
        ideal=reference,
        clock_error_us=max(compared) if len(compared) == len(errors) else None,
        products=products,
        kernels=kernels,
    )


def _add(step: _Step, rank: Rank, outer: Event, inner: Sequence[Event], times: Times) -> float:
    """Add one rank's step; return the microseconds of its own computing."""
    step.ranks += 1
    step.begin, step.end = min(step.begin, outer.begin), max(step.end, outer.end)
    step.spans.append((outer.begin, outer.end))
    spans = [event for event in inner if event.what not in UNDER_WAY]
    rest, lengths = own_times(outer, spans)
    step.sums["other"] += rest
    computed = 0.0
    for event, length in zip(spans, lengths, strict=True):
        if event.what in COMPUTE or event.what == RECOMPUTE:
            step.sums["recompute" if event.what == RECOMPUTE else "compute"] += length
            times.add(event, length)
            computed += length
        elif event.what in MESSAGES:
            step.awaited.append((_key(rank, event), event))
        elif event.what == "wait norm":
            step.norms.append(event)
        elif event.what in WAITS:
            step.sums[f"exposed_{WAITS[event.what]}"] += length
        else:  # of newer programs too: what is not known here is told by its sum
            step.sums[{"wait data": "data", "optimizer": "optimizer"}.get(event.what, "other")] += length
        if event.what in SENDS:
            step.sent[_key(rank, event)] = event
    under_way: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in inner:
        if event.what in UNDER_WAY:
            under_way[UNDER_WAY[event.what]].append((event.begin, event.end))
    for kind, intervals in under_way.items():
        step.under_way[kind] += total(intervals)
    return computed


def _split_waits(step: _Step) -> list[float]:
    """Part waits for messages and for the norm into bubble and communication; return messages' times on their way."""
    transits: dict[int, list[float]] = defaultdict(list)
    for key, event in step.awaited:
        sent = step.sent.get(key)
        late = min(max(sent.begin - event.begin, 0.0), event.length) if sent else 0.0
        step.sums["bubble"] += late
        step.sums["exposed_p2p"] += event.length - late
        if sent and event.begin <= sent.begin:  # it was awaited before it was sent: this was its whole way
            transits[sent.size].append(event.end - sent.begin)
    last = max((event.begin for event in step.norms), default=0.0)
    for event in step.norms:
        late = min(last - event.begin, event.length)
        step.sums["bubble"] += late
        step.sums["exposed_agreement"] += event.length - late
    step.sums["other"] += sum(step.end - step.begin - (end - begin) for begin, end in step.spans)
    medians = {size: statistics.median(found) for size, found in transits.items()}
    step.under_way["p2p"] = sum(medians.get(event.size, 0.0) for event in step.sent.values())
    return [time for found in transits.values() for time in found]


def _shares(sums: dict[str, float], whole: float) -> dict[str, float | None]:
    """Return the percent of all ranks' time: together a hundred."""
    names = ("compute", "recompute", "optimizer", "data", "bubble", *(f"exposed_{kind}" for kind in COMMUNICATION))
    shares: dict[str, float | None] = {name: sums.get(name, 0.0) / whole * 100 for name in (*names, "other")}
    shares["exposed"] = sum(shares[f"exposed_{kind}"] or 0.0 for kind in COMMUNICATION)
    return shares


def _communication(steps: Sequence[_Step], sums: dict[str, float], count: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of a rank and step, of the kinds that there were."""
    found = {}
    for kind in COMMUNICATION:
        exposed, under_way = sums.get(f"exposed_{kind}", 0.0), sum(step.under_way[kind] for step in steps)
        if exposed or under_way:
            found[kind] = {"exposed_ms": exposed / count / 1e3, "under_way_ms": under_way / count / 1e3}
    return found


def _hidden(times: dict[str, float]) -> float | None:
    """Return the percent of a kind's time under way that was not waited for; None where that time is not known."""
    if not times["under_way_ms"]:
        return None
    return max(0.0, 1 - times["exposed_ms"] / times["under_way_ms"]) * 100


def _stages(own: dict[int, float], places: dict[int, tuple[int, str]]) -> tuple[list[float], list[Slow]]:
    """Return the stages' mean computing, and the ranks by how much longer than their stage's median they compute."""
    by_stage: dict[int, list[float]] = defaultdict(list)
    for rank, time in own.items():
        by_stage[places[rank][0]].append(time)
    medians = {stage: statistics.median(times) for stage, times in by_stage.items()}
    slow = [Slow(rank, places[rank][1], time, medians[places[rank][0]]) for rank, time in own.items()]
    slow.sort(key=lambda s: s.median_ms - s.own_ms if len(own) > len(by_stage) else -s.own_ms)
    return [statistics.mean(by_stage[stage]) for stage in sorted(by_stage)], slow


def _key(rank: Rank, event: Event) -> Key:
    return rank.dp_rank, rank.tp_rank, event.what.split()[1], event.stage, event.micro_batch
