"""Merges the records of many ranks into one Chrome trace, for Perfetto (ui.perfetto.dev) and chrome://tracing.

Each rank is a process. Its thread "schedule" has the rank's recorded events, "communication" the operations in flight;
the threads and streams of torch's profiler follow if the rank was profiled. An arrow leads from a send to the wait for
it. Times are microseconds from the begin of the first step, on rank 0's clock. Only one rank is in memory at a time.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from llama_ds.atomic_files import atomic_file
from llama_ds.job.trace_format import MERGED_FILE
from llama_ds.perf.trace.kernels import monotonic_offset
from llama_ds.perf.trace.kinds import IN_FLIGHT, MESSAGES, SENDS
from llama_ds.perf.trace.read import Event, RankRecord, profiles, rank_files, read, read_profile, shown

SCHEDULE, COMMUNICATION = 1, 10  # thread ids; overlapping communication uses further threads below PROFILER
PROFILER = 100
_KEPT = ("X", "s", "f", "t", "i")  # phases of profiler events to keep; the arrows lead from launch to kernel
Chrome = dict[str, Any]


@dataclass
class _Arrows:
    """Assigns ids to messages, so that both ends of an arrow have the same id."""

    numbers: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def number(self, key: tuple[Any, ...]) -> int:
        return self.numbers.setdefault(key, len(self.numbers) + 1)


def merge(folder: str | Path) -> Path:
    """Write the merged trace of the ranks in `read.shown` into the folder of their files; return its path.

    Raises:
        UserError: A file is missing, truncated, or from another recording.
    """
    where = next(iter(rank_files(folder).values())).parent
    profiled, ranks = profiles(where), shown(folder)
    origin = min(step.begin for rank in read(folder, ranks) for step, _ in rank.steps()[:1])
    arrows = _Arrows()
    path = where / MERGED_FILE
    with atomic_file(str(path)) as compressed, gzip.open(compressed, "wt", compresslevel=5) as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        _write(file, _all_events(read(folder, ranks), profiled, origin, arrows))
        file.write("\n]}\n")
    return path


def _all_events(
    ranks: Iterable[RankRecord], profiled: dict[int, Path], origin: float, arrows: _Arrows
) -> Iterator[Chrome]:
    for rank in ranks:
        yield from _rank_events(rank, origin, arrows)
        if rank.rank in profiled:
            yield from _profile_events(rank, read_profile(profiled[rank.rank]), origin)


def _write(file: TextIO, events: Iterable[Chrome]) -> None:
    separator = ""
    for event in events:
        file.write(separator + json.dumps(event, separators=(",", ":")))
        separator = ",\n"


def _rank_events(rank: RankRecord, origin: float, arrows: _Arrows) -> Iterator[Chrome]:
    yield _named("process_name", rank.rank, 0, name=f"rank {rank.rank}: {rank.location}")
    yield _named("process_sort_index", rank.rank, 0, sort_index=rank.rank)
    yield from _thread(rank.rank, SCHEDULE, "schedule")
    number = rank.about["first_step"]
    in_flight = [event for event in rank.events if event.what in IN_FLIGHT]
    for step, inner in rank.steps():
        spans = [event for event in inner if event.what not in IN_FLIGHT]
        for event in (step, *spans):
            name = f"step {number}" if event is step else _name(event)
            yield _slice(rank.rank, SCHEDULE, name, event, origin)
            if event.what in SENDS or event.what in MESSAGES:
                yield _arrow(rank, event, number, origin, arrows)
        number += 1
    for lane, events in enumerate(_lanes(in_flight)):
        yield from _thread(rank.rank, COMMUNICATION + lane, "communication" + (f" {lane + 1}" if lane else ""))
        for event in events:
            yield _slice(rank.rank, COMMUNICATION + lane, event.what, event, origin)


def _profile_events(rank: RankRecord, events: Sequence[Chrome], origin: float) -> Iterator[Chrome]:
    """Yield the profiler's events with the rank as process, and times on rank 0's clock."""
    offset = monotonic_offset(events)
    if offset is None:
        return
    names = _thread_names(events)
    t0, shift, drift = rank.clock.line
    by_thread: dict[tuple[Any, Any], list[Chrome]] = defaultdict(list)
    for event in events:
        if event.get("ph") in _KEPT and "ts" in event and event.get("cat") != "Trace":
            by_thread[event.get("pid"), event.get("tid")].append(event)
    thread = PROFILER
    for key, own in by_thread.items():
        name = names.get(key, f"profiler {key[0]} {key[1]}")
        while own:  # events of a thread that overlap without nesting go to further threads
            fitting, own = _nested(own)
            yield from _thread(rank.rank, thread, name)
            for event in fitting:
                at = float(event["ts"]) + offset  # on the rank's own clock
                at += shift + (at - t0) * drift - origin
                moved = {**event, "pid": rank.rank, "tid": thread, "ts": round(at, 3)}
                if "id" in moved:  # arrow ids are unique only within a profile
                    moved["id"] = f"{rank.rank}.{moved['id']}"
                yield moved
            thread, name = thread + 1, f"{names.get(key, name)}, beside"


def _nested(events: Sequence[Chrome]) -> tuple[list[Chrome], list[Chrome]]:
    """Split a thread's events into those that nest properly (and all that are not slices), and the rest."""
    fitting, others = [], []
    open_: list[float] = []
    for event in sorted(events, key=lambda e: (float(e["ts"]), -float(e.get("dur", 0)))):
        begin, end = float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0))
        while open_ and open_[-1] <= begin:
            open_.pop()
        if event["ph"] != "X" or not open_ or end <= open_[-1]:
            fitting.append(event)
            if event["ph"] == "X":
                open_.append(end)
        else:
            others.append(event)
    return fitting, others


def _thread_names(events: Iterable[Chrome]) -> dict[tuple[Any, Any], str]:
    found = {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "thread_name":
            found[event.get("pid"), event.get("tid")] = f"profiler: {event['args']['name']}"
    return found


def _slice(process: int, thread: int, name: str, event: Event, origin: float) -> Chrome:
    found: Chrome = {"ph": "X", "cat": event.what, "name": name, "pid": process, "tid": thread}
    found |= {"ts": round(event.begin - origin, 3), "dur": round(event.length, 3)}
    args = {"stage": event.stage, "micro_batch": event.micro_batch, "bytes": event.size}
    known = {key: value for key, value in args.items() if value > (0 if key == "bytes" else -1)}
    return {**found, "args": known} if known else found


def _arrow(rank: RankRecord, event: Event, step: int, origin: float, arrows: _Arrows) -> Chrome:
    """Return one end of a message's arrow; it binds to the enclosing send or wait slice."""
    kind = event.what.split()[1]
    number = arrows.number((rank.pipeline, step, kind, event.stage, event.micro_batch))
    found: Chrome = {"cat": "message", "name": kind, "id": number, "pid": rank.rank, "tid": SCHEDULE}
    if event.what in SENDS:
        return {"ph": "s", **found, "ts": round(event.begin - origin, 3)}
    return {"ph": "f", "bp": "e", **found, "ts": round(event.end - origin, 3)}


def _lanes(events: Sequence[Event]) -> list[list[Event]]:
    """Distribute events over as few lanes as possible, so that the events of a lane do not overlap."""
    lanes: list[list[Event]] = []
    for event in sorted(events, key=lambda e: e.begin):
        free = next((lane for lane in lanes if lane[-1].end <= event.begin), None)
        if free is not None:
            free.append(event)
        elif len(lanes) < PROFILER - COMMUNICATION:
            lanes.append([event])
    return lanes


def _thread(process: int, thread: int, name: str) -> Iterator[Chrome]:
    yield _named("thread_name", process, thread, name=name)
    yield _named("thread_sort_index", process, thread, sort_index=thread)


def _named(what: str, process: int, thread: int, **args: Any) -> Chrome:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": args}


def _name(event: Event) -> str:
    return f"{event.what} {event.micro_batch}" if event.micro_batch >= 0 else event.what
