"""Sums of the ranks' time in each recorded step, by kind. They are small compared with the events, and additive.

A rank computes or waits. A wait for a message counts as bubble until the message is sent, and as exposed communication
from then on. Other waits count as exposed communication in full, although a late rank prolongs them too. The wait for
the gradient norm, which involves all ranks, is split once all of them are known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_ds.perf.trace.ideal import Times
from llama_ds.perf.trace.kinds import COMPUTE, IN_FLIGHT, MESSAGES, RECOMPUTE, SENDS, UPDATES, WAITS
from llama_ds.perf.trace.read import Event, RankRecord
from llama_ds.perf.trace.spans import own_times, total
from llama_ds.schedules.schedule import Schedule

Key = tuple[Any, ...]
_OWN = {"wait data": "data"} | dict.fromkeys(UPDATES, "optimizer")  # metrics of a rank's own spans, by event


@dataclass
class Step:
    """Sums over one step of some ranks. Times are microseconds on rank 0's clock."""

    begin: float = float("inf")
    end: float = float("-inf")
    ranks: int = 0
    within: float = 0.0  # length of the step, summed over ranks
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    in_flight: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    sent: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # number of messages, by bytes
    transits: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))  # transit times, by bytes
    norms: list[tuple[float, float]] = field(default_factory=list)  # waits for the gradient norm

    def add(self, other: Step) -> None:
        """Add the sums of other ranks for the same step."""
        self.begin, self.end = min(self.begin, other.begin), max(self.end, other.end)
        self.ranks += other.ranks
        self.within += other.within
        for kind, time in other.sums.items():
            self.sums[kind] += time
        for kind, time in other.in_flight.items():
            self.in_flight[kind] += time
        for size, count in other.sent.items():
            self.sent[size] += count
        for size, found in other.transits.items():
            self.transits[size] += found
        self.norms += other.norms


@dataclass
class Account:
    """Sums over all steps of the ranks of one or more complete pipelines."""

    schedule: Schedule
    steps: list[Step] = field(default_factory=list)
    times: Times = field(default_factory=Times)
    compute: dict[int, float] = field(default_factory=dict)  # compute time by rank
    locations: dict[int, tuple[int, str]] = field(default_factory=dict)  # by rank: stage, location as text
    errors: list[float | None] = field(default_factory=list)  # clock error of each rank

    def add(self, other: Account) -> None:
        """Add other ranks of the same recording."""
        self.steps += [Step() for _ in range(len(other.steps) - len(self.steps))]
        for own, more in zip(self.steps, other.steps, strict=False):
            own.add(more)
        self.times.extend(other.times)
        self.compute |= other.compute
        self.locations |= other.locations
        self.errors += other.errors


@dataclass
class _Messages:
    """Messages of one step between the ranks of pipelines."""

    sent: dict[Key, Event] = field(default_factory=dict)
    awaited: list[tuple[Key, Event]] = field(default_factory=list)


def account(ranks: Iterable[RankRecord]) -> Account:
    """Return the account of ranks that form one or more complete pipelines."""
    found: Account | None = None
    messages: list[_Messages] = []
    for rank in ranks:
        found = found or Account(rank.schedule)
        found.locations[rank.rank] = rank.coords.pp, rank.location
        found.errors.append(rank.clock.error)
        recorded = rank.steps()[: rank.about["measured_steps"]]
        found.steps += [Step() for _ in range(len(recorded) - len(found.steps))]
        messages += [_Messages() for _ in range(len(recorded) - len(messages))]
        found.compute[rank.rank] = sum(
            _add(step, those, rank, outer, inner, found.times)
            for step, those, (outer, inner) in zip(found.steps, messages, recorded, strict=False)
        )
    assert found
    for step, those in zip(found.steps, messages, strict=True):
        _split_waits(step, those)
    return found


def _add(
    step: Step, messages: _Messages, rank: RankRecord, outer: Event, inner: Sequence[Event], times: Times
) -> float:
    """Add one rank's step; return its compute time in microseconds."""
    step.ranks += 1
    step.begin, step.end = min(step.begin, outer.begin), max(step.end, outer.end)
    step.within += outer.length
    spans = [event for event in inner if event.what not in IN_FLIGHT]
    rest, lengths = own_times(outer, spans)
    step.sums["other"] += rest
    computed = 0.0
    for event, length in zip(spans, lengths, strict=True):
        if event.what in COMPUTE or event.what == RECOMPUTE:
            step.sums["recompute" if event.what == RECOMPUTE else "compute"] += length
            times.add(event, length)
            computed += length
        elif event.what in MESSAGES:
            messages.awaited.append((_key(rank, event), event))
        elif event.what == "wait norm":
            step.norms.append((event.begin, event.end))
        elif event.what in WAITS:
            step.sums[f"exposed_{WAITS[event.what]}"] += length
        else:  # kinds that are unknown here, such as those of newer versions, count as other
            step.sums[_OWN.get(event.what, "other")] += length
        if event.what in SENDS:
            messages.sent[_key(rank, event)] = event
            step.sent[event.size] += 1
    in_flight: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in inner:
        if event.what in IN_FLIGHT:
            in_flight[IN_FLIGHT[event.what]].append((event.begin, event.end))
    for kind, intervals in in_flight.items():
        step.in_flight[kind] += total(intervals)
    return computed


def _split_waits(step: Step, messages: _Messages) -> None:
    """Split waits for messages into bubble and exposed communication; record the messages' transit times."""
    for key, event in messages.awaited:
        sent = messages.sent.get(key)
        late = min(max(sent.begin - event.begin, 0.0), event.length) if sent else 0.0
        step.sums["bubble"] += late
        step.sums["exposed_p2p"] += event.length - late
        if sent and event.begin <= sent.begin:  # the receiver was already waiting, so the wait covers the full transit
            step.transits[sent.size].append(event.end - sent.begin)


def _key(rank: RankRecord, event: Event) -> Key:
    return rank.pipeline, event.what.split()[1], event.stage, event.micro_batch
