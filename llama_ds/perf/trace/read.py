"""Reads the ranks' records of steps (`llama_ds.parallel.trace`) and aligns them to one clock.

A file rank<N>.json has the rank's coordinates and host, the offset of its clock from rank 0's, and its events as rows:
kind, begin and end in microseconds on the rank's own clock, stage, micro-batch, bytes.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from llama_ds.errors import UserError
from llama_ds.job.trace_format import FORMAT, RANK_FILE
from llama_ds.layout.axes import AXES, NAMED, Axes, Coords
from llama_ds.schedules.schedule import NAMES, Schedule

_PROFILE = re.compile(r"profile_rank(\d+)\.json\.gz")
_RANK = re.compile(r"rank(\d+)\.json")
MAX_SHOWN = 64  # ranks to draw, or to merge into one trace
_MAX_NAMED = 8
_COUNTS = ("first_step", "measured_steps", "pp", "micro_batches", "virtual_stages", "extra_warmup")
_MAX_COUNT = 10**7  # more is damage


class Event(NamedTuple):
    """A recorded interval, in microseconds on rank 0's clock."""

    what: str
    begin: float
    end: float
    stage: int = -1
    micro_batch: int = -1
    size: int = 0  # bytes

    @property
    def length(self) -> float:
        """Duration in microseconds."""
        return self.end - self.begin


@dataclass(frozen=True)
class RankClock:
    """Offset from a rank's clock to rank 0's: measured at some points, linear in between."""

    points: tuple[tuple[float, float, float], ...]  # time, offset, maximum error of the offset; microseconds

    @property
    def error(self) -> float | None:
        """Maximum error at the points, in microseconds; None without points."""
        return max((error for _, _, error in self.points), default=None)

    @property
    def line(self) -> tuple[float, float, float]:
        """(t0, offset, drift): at the rank's time t, rank 0's clock shows t + offset + (t - t0) * drift."""
        if not self.points:
            return 0.0, 0.0, 0.0
        first, last = self.points[0], self.points[-1]
        length = last[0] - first[0]
        return first[0], first[1], (last[1] - first[1]) / length if length > 0 else 0.0


@dataclass(frozen=True)
class RankRecord:
    """The record of one rank."""

    rank: int
    world: int
    host: str
    coords: Coords
    about: dict[str, Any]  # schedule, device, dtype, first step, number of steps before the profiled ones
    clock: RankClock
    events: list[Event]

    @property
    def location(self) -> str:
        """Coordinates and host as text."""
        return f"{self.coords.words()}, {self.host}"

    @property
    def pipeline(self) -> Coords:
        """Key of the rank's pipeline: its coordinates without pp."""
        return self.coords._replace(pp=0)

    @property
    def schedule(self) -> Schedule:
        """The schedule that the rank ran."""
        about = self.about
        times = about.get("pass_times")
        return Schedule(
            about["schedule"],
            about["pp"],
            about["micro_batches"],
            about["virtual_stages"],
            about["extra_warmup"],
            times and tuple(times),
            about.get("joint", 1),
        )

    def steps(self) -> list[tuple[Event, list[Event]]]:
        """Return each step with the events that begin within it, sorted by begin, longer events first."""
        events = sorted(sorted(self.events, key=itemgetter(2), reverse=True), key=itemgetter(1))  # by end, by begin
        begins = [event.begin for event in events]
        found = []
        for step in (event for event in events if event.what == "step"):
            first, last = (bisect_right(begins, t) for t in (step.begin - 1e-9, step.end - 1e-9))
            found.append((step, [e for e in events[first:last] if e is not step]))
        return found


def rank_files(folder: str | Path) -> dict[int, Path]:
    """Return the ranks' files in a folder or its subfolder `trace`, by rank.

    Raises:
        UserError: There are no files, or those of some ranks are missing.
    """
    where = Path(folder)
    if not where.is_dir():
        raise UserError(f"{folder}: is not a folder; give one of rank*.json, such as runs/NAME/trace")
    where = where / "trace" if (where / "trace").is_dir() else where
    files = {int(match[1]): path for path in sorted(where.iterdir()) if (match := _RANK.fullmatch(path.name))}
    if not files:
        raise UserError(f"{folder}: no rank*.json in it; set logging.trace_step and run, or give another folder")
    first = next(iter(files.values()))
    world = read_rank(first).world
    missing = sorted(set(range(world)) - files.keys())
    if missing:
        names = ", ".join(RANK_FILE.format(rank) for rank in missing[:_MAX_NAMED])
        more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        raise UserError(
            f"{where}: {len(missing)} of {world} ranks' files are missing: {names}{more}; messages cannot be matched "
            "without them: copy them here, or record again"
        )
    if beyond := sorted(files.keys() - set(range(world))):
        raise UserError(
            f"{files[beyond[0]]}: {first.name} is from a job of {world} ranks, so this file is from another recording; "
            "record into an empty folder"
        )
    return files


def shown(folder: str | Path) -> list[int]:
    """Return the ranks to show: all of them, or one pipeline and the profiled ranks if there are over MAX_SHOWN.

    Raises:
        UserError: See `rank_files` and `read_rank`.
    """
    files = rank_files(folder)
    if len(files) <= MAX_SHOWN:
        return list(files)
    first = next(iter(files.values()))
    pp = read_rank(first).about["pp"]
    axes = Axes(pp=pp, dp=len(files) // pp)
    return sorted({axes.rank(pp=stage) for stage in range(pp)} | profiles(first.parent).keys())


def read(folder: str | Path, only: Collection[int] | None = None) -> Iterator[RankRecord]:
    """Yield the records of the ranks in a folder one by one, or `only` those of some ranks.

    Raises:
        UserError: See `rank_files` and `read_rank`, or a file is from another recording.
    """
    files = rank_files(folder)
    first: RankRecord | None = None
    for number, path in files.items():
        if only is not None and number not in only:
            continue
        rank = read_rank(path)
        first = first or rank
        check_alike(path, rank, first)
        yield rank


def check_alike(path: Path, rank: RankRecord, first: RankRecord) -> None:
    """Check that a rank's file is from the same recording as the first.

    Raises:
        UserError: It is from another recording.
    """
    for key in ("first_step", "measured_steps", "schedule", "pp", "micro_batches"):
        if rank.about[key] != first.about[key]:
            raise UserError(
                f"{path}: {key} is {rank.about[key]!r}, rank {first.rank}'s is {first.about[key]!r}; the files are "
                "from several recordings: record into an empty folder"
            )


def read_rank(path: Path) -> RankRecord:
    """Read the file of one rank.

    Raises:
        UserError: The file is missing or incomplete.
    """
    try:
        data = json.loads(path.read_bytes())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, not {FORMAT}")
        clock = RankClock(tuple((float(at), float(offset), float(error)) for at, offset, error in data.pop("clock")))
        t0, offset, drift = clock.line
        events = [
            Event(what, a + offset + (a - t0) * drift, b + offset + (b - t0) * drift, stage, micro_batch, size)
            for what, a, b, stage, micro_batch, size in data.pop("events")
        ]
        rank, world = int(data.pop("rank")), int(data.pop("world"))
        recorded = [axis for axis in AXES if axis in NAMED or f"{axis}_rank" in data]
        coords = Coords(**{axis: int(data.pop(f"{axis}_rank")) for axis in recorded})
        found = RankRecord(rank, world, str(data.pop("host")), coords, data, clock, events)
        counts = [world, *(data[name] for name in _COUNTS)]
        assert all(type(count) is int and 0 <= count <= _MAX_COUNT for count in counts)
        assert all(type(time) is int for time in data.get("pass_times") or ())  # in any unit
        assert type(joint := data.get("joint", 1)) is int and 0 < joint <= _MAX_COUNT
        assert found.schedule.name in NAMES and min(data["first_step"], data["measured_steps"], data["pp"]) > 0
        assert world % data["pp"] == 0 and all(isinstance(event.what, str) for event in events)
    except (
        OSError,
        ArithmeticError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        AssertionError,
        RecursionError,
    ) as error:
        what = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else error.strerror
        raise UserError(
            f"{path}: is not a complete record of a rank's steps ({what}); copy it again, or record again"
        ) from None
    if not any(event.what == "step" for event in events):
        raise UserError(f"{path}: has no complete step; let the run go on beyond logging.trace_step, or record again")
    return found


def profiles(where: Path) -> dict[int, Path]:
    """Return the files of torch's profiler in the folder `where`, by rank."""
    return {int(match[1]): path for path in sorted(where.iterdir()) if (match := _PROFILE.fullmatch(path.name))}


def read_profile(path: Path) -> list[dict[str, Any]]:
    """Return the events of a file of torch's profiler.

    Raises:
        UserError: The file is missing or incomplete.
    """
    try:
        content = path.read_bytes()
        data = json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
        events = data["traceEvents"]
        return [event for event in events if isinstance(event, dict)]
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: is not a complete file of torch's profiler ({error}); record again") from None
