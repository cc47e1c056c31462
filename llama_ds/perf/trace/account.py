"""What ranks did in each recorded step, as sums: small beside their events, and added up over pipelines.

A rank computes, or waits. Waiting for a message counts as exposed communication from when both it waits and the
message has been sent; before that the sender was not ready, and the wait is bubble. Other waits count whole: they too
are longer where another rank is late. The wait for the norm, of all ranks, is parted when all of them are known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_ds.perf.trace.ideal import Times
from llama_ds.perf.trace.kinds import COMPUTE, MESSAGES, RECOMPUTE, SENDS, UNDER_WAY, WAITS
from llama_ds.perf.trace.read import Event, RankRecord
from llama_ds.perf.trace.spans import own_times, total
from llama_ds.schedules.schedule import Schedule

Key = tuple[Any, ...]


@dataclass
class Step:
    """One step of some ranks. Times are microseconds of rank 0's clock."""

    begin: float = float("inf")
    end: float = float("-inf")
    ranks: int = 0
    within: float = 0.0  # the step's length, of all ranks
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    under_way: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    sent: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # by bytes of a message: how many
    transits: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))  # and how long their way took
    norms: list[tuple[float, float]] = field(default_factory=list)  # waits for the norm

    def add(self, other: Step) -> None:
        """Add the same step of other ranks."""
        self.begin, self.end = min(self.begin, other.begin), max(self.end, other.end)
        self.ranks += other.ranks
        self.within += other.within
        for kind, time in other.sums.items():
            self.sums[kind] += time
        for kind, time in other.under_way.items():
            self.under_way[kind] += time
        for size, count in other.sent.items():
            self.sent[size] += count
        for size, found in other.transits.items():
            self.transits[size] += found
        self.norms += other.norms


@dataclass
class Account:
    """All steps of some ranks, whole pipelines of them."""

    schedule: Schedule
    steps: list[Step] = field(default_factory=list)
    times: Times = field(default_factory=Times)
    own: dict[int, float] = field(default_factory=dict)  # by rank: its own computing
    places: dict[int, tuple[int, str]] = field(default_factory=dict)  # its stage; where it stands, in words
    errors: list[float | None] = field(default_factory=list)  # of the ranks' clocks

    def add(self, other: Account) -> None:
        """Add other ranks of the same recording."""
        self.steps += [Step() for _ in range(len(other.steps) - len(self.steps))]
        for own, more in zip(self.steps, other.steps, strict=False):
            own.add(more)
        self.times.extend(other.times)
        self.own |= other.own
        self.places |= other.places
        self.errors += other.errors


@dataclass
class _Messages:
    """One step's messages between the ranks of pipelines."""

    sent: dict[Key, Event] = field(default_factory=dict)
    awaited: list[tuple[Key, Event]] = field(default_factory=list)


def account(ranks: Iterable[RankRecord]) -> Account:
    """Return what ranks did that make up whole pipelines, at least one."""
    found: Account | None = None
    messages: list[_Messages] = []
    for rank in ranks:
        found = found or Account(rank.schedule)
        found.places[rank.rank] = rank.coords.pp, rank.place
        found.errors.append(rank.clock.error)
        recorded = rank.steps()[: rank.about["measured_steps"]]
        found.steps += [Step() for _ in range(len(recorded) - len(found.steps))]
        messages += [_Messages() for _ in range(len(recorded) - len(messages))]
        found.own[rank.rank] = sum(
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
    """Add one rank's step; return the microseconds of its own computing."""
    step.ranks += 1
    step.begin, step.end = min(step.begin, outer.begin), max(step.end, outer.end)
    step.within += outer.length
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
            messages.awaited.append((_key(rank, event), event))
        elif event.what == "wait norm":
            step.norms.append((event.begin, event.end))
        elif event.what in WAITS:
            step.sums[f"exposed_{WAITS[event.what]}"] += length
        else:  # of newer programs too: what is not known here is told by its sum
            step.sums[{"wait data": "data", "optimizer": "optimizer"}.get(event.what, "other")] += length
        if event.what in SENDS:
            messages.sent[_key(rank, event)] = event
            step.sent[event.size] += 1
    under_way: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in inner:
        if event.what in UNDER_WAY:
            under_way[UNDER_WAY[event.what]].append((event.begin, event.end))
    for kind, intervals in under_way.items():
        step.under_way[kind] += total(intervals)
    return computed


def _split_waits(step: Step, messages: _Messages) -> None:
    """Part waits for messages into bubble and communication; note messages' times on their way."""
    for key, event in messages.awaited:
        sent = messages.sent.get(key)
        late = min(max(sent.begin - event.begin, 0.0), event.length) if sent else 0.0
        step.sums["bubble"] += late
        step.sums["exposed_p2p"] += event.length - late
        if sent and event.begin <= sent.begin:  # it was awaited before it was sent: this was its whole way
            step.transits[sent.size].append(event.end - sent.begin)


def _key(rank: RankRecord, event: Event) -> Key:
    return rank.pipeline, event.what.split()[1], event.stage, event.micro_batch
