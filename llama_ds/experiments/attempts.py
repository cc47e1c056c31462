"""The attempts of a run's jobs, read from their events: when each began, how far it came, how and when it ended."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# How an attempt ends, as in `llama_ds.launch.supervise.attempt`.
# Failures of machines, network or code, which count for the mean time between failures.
FAILURES = ("failure", "death", "host lost", "hang", "corruption", "launcher")
ENDS = (*FAILURES, "divergence", "spike", "mistake", "done", "ended")
AS_ASKED = ("done", "ended")
_NUMBERS = ("time", "step", "world", "seconds", "pause_s", "after_s")

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Mark:
    """A `progress` event: completed steps at a time, and the seconds of other phases since the mark before."""

    time: float
    step: int
    seconds: Mapping[str, float]


@dataclass
class RecordedAttempt:
    """One start of the ranks. Times are seconds since the epoch."""

    job: str
    begun: float  # the end of the attempt before, or the start of the job
    restart: tuple[float, float] | None = None  # time of the decision to restart, and the pause after it
    started: float | None = None  # None: the first host did not answer
    joined: float | None = None
    world: int = 0
    marks: list[Mark] = field(default_factory=list)
    detected: float | None = None
    failed: float | None = None  # the last sign of life before the failure
    leaving: float | None = None  # when the supervisor asked ranks to leave, to keep their processes
    killing: float | None = None  # when the supervisor began to end the ranks
    ended: float = 0.0
    kind: str = ""  # "" for an attempt that has no end: it runs, or its launcher was killed
    step: int = 0
    hosts: Sequence[str] = ()

    @property
    def stopped(self) -> float:
        """The time at which training stopped."""
        times = [t for t in (self.failed, self.leaving, self.killing, self.ended) if t is not None]
        return max(min(times), self.begun)


def attempts_of(events: Sequence[Event]) -> tuple[list[RecordedAttempt], dict[str, tuple[float, float]], int]:
    """Return all attempts in order, begin and end of each job, and the number of events with wrong values."""
    usable = [event for event in events if is_usable(event)]
    jobs: dict[str, list[Event]] = {}
    for event in usable:
        jobs.setdefault(event["job"], []).append(event)
    found = [attempt for job, lines in jobs.items() for attempt in _of_job(job, lines)]
    return found, {job: (lines[0]["time"], lines[-1]["time"]) for job, lines in jobs.items()}, len(events) - len(usable)


def is_usable(event: Event) -> bool:
    """Return whether the values that are read from an event have their types."""
    if not isinstance(event.get("event"), str):
        return False
    hosts = event.get("hosts", [])
    if event["event"] in ENDS and not (isinstance(hosts, list) and all(isinstance(host, str) for host in hosts)):
        return False
    if event["event"] == "progress":
        seconds = event.get("seconds")
        if not isinstance(seconds, dict) or not all(_is_number(value) for value in seconds.values()):
            return False
        return isinstance(event.get("step"), int)
    return all(_is_number(event.get(name, 0)) for name in _NUMBERS)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _of_job(job: str, events: Sequence[Event]) -> Iterator[RecordedAttempt]:
    """Yield the attempts of one job; the last one may have no end."""
    attempt = RecordedAttempt(job, events[0]["time"])
    for event in events:
        what, time = event["event"], event["time"]
        if what == "restart":
            attempt.restart = time, event.get("pause_s", 0.0)
        elif what == "attempt started":
            attempt.started, attempt.world = time, int(event.get("world", 0))
        elif what == "ranks joined":
            attempt.joined = time
        elif what == "progress":
            attempt.marks.append(Mark(time, event["step"], event["seconds"]))
        elif what == "detected" and attempt.detected is None:
            attempt.detected, attempt.failed = time, time - event.get("after_s", 0.0)
        elif what == "left":
            attempt.leaving = time - event.get("seconds", 0.0)
        elif what == "killed":
            attempt.killing = time - event.get("seconds", 0.0)
        elif what in ENDS:
            attempt.kind, attempt.ended, attempt.step = what, time, int(event.get("step", 0))
            attempt.hosts = tuple(event.get("hosts", ()))
            yield attempt
            attempt = RecordedAttempt(job, time)
    if attempt.started is not None or attempt.restart:
        attempt.ended = events[-1]["time"]
        yield attempt
