"""The records that ranks leave of steps (`llama_ds.parallel.trace`), read and put onto one clock.

A file rank<N>.json holds where its rank stands, how its clock differs from rank 0's, and its events in rows: what it
was, begin and end in microseconds of the rank's own clock, stage, micro-batch, bytes.
"""

from __future__ import annotations

import gzip
import json
import re
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
MOST_SHOWN = 64  # ranks that are drawn, or merged into one trace
_MOST_NAMED = 8


class Event(NamedTuple):
    """Something that lasted, on rank 0's clock in microseconds."""

    what: str
    begin: float
    end: float
    stage: int = -1
    micro_batch: int = -1
    size: int = 0  # bytes

    @property
    def length(self) -> float:
        """How long it lasted, in microseconds."""
        return self.end - self.begin


@dataclass(frozen=True)
class RankClock:
    """What to add to a rank's clock to have rank 0's: measured at points of the rank's time, along a line elsewhere."""

    points: tuple[tuple[float, float, float], ...]  # at, offset, and its greatest possible error; microseconds

    @property
    def error(self) -> float | None:
        """The greatest possible error at the points, in microseconds; None where nothing is known."""
        return max((error for _, _, error in self.points), default=None)

    @property
    def line(self) -> tuple[float, float, float]:
        """(t0, offset, drift): rank 0's clock shows t + offset + (t - t0) drift at t."""
        if not self.points:
            return 0.0, 0.0, 0.0
        first, last = self.points[0], self.points[-1]
        length = last[0] - first[0]
        return first[0], first[1], (last[1] - first[1]) / length if length > 0 else 0.0


@dataclass(frozen=True)
class RankRecord:
    """What one rank recorded."""

    rank: int
    world: int
    host: str
    coords: Coords
    about: dict[str, Any]  # schedule, device, dtype, first step, how many steps there are before the profiled ones
    clock: RankClock
    events: list[Event]

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        return f"{self.coords.words()}, {self.host}"

    @property
    def pipeline(self) -> Coords:
        """What the ranks of its pipeline have in common."""
        return self.coords._replace(pp=0)

    @property
    def schedule(self) -> Schedule:
        """The schedule that it ran."""
        about = self.about
        return Schedule(
            about["schedule"], about["pp"], about["micro_batches"], about["virtual_stages"], about["extra_warmup"]
        )

    def steps(self) -> list[tuple[Event, list[Event]]]:
        """Return each step with what began within it, by begin; longer things first."""
        events = sorted(sorted(self.events, key=itemgetter(2), reverse=True), key=itemgetter(1))  # by end, by begin
        begins = [event.begin for event in events]
        found = []
        for step in (event for event in events if event.what == "step"):
            first, last = (bisect_right(begins, t) for t in (step.begin - 1e-9, step.end - 1e-9))
            found.append((step, [e for e in events[first:last] if e is not step]))
        return found


def rank_files(folder: str | Path) -> dict[int, Path]:
    """Return the ranks' files of a folder, or of the folder `trace` in it, by rank.

    Raises:
        UserError: there are none, or not all ranks'.
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
        names = ", ".join(RANK_FILE.format(rank) for rank in missing[:_MOST_NAMED])
        more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
        raise UserError(
            f"{where}: {len(missing)} of {world} ranks' files are missing: {names}{more}; messages cannot be followed "
            "without them: copy them here, or record again"
        )
    if beyond := sorted(files.keys() - set(range(world))):
        raise UserError(
            f"{files[beyond[0]]}: {first.name} is of {world} ranks, so this is another recording's; record into an "
            "empty folder"
        )
    return files


def shown(folder: str | Path) -> list[int]:
    """Return the ranks that people are shown: all, or of more than MOST_SHOWN one pipeline's and those profiled.

    Raises:
        UserError: as `rank_files` and `read_rank`.
    """
    files = rank_files(folder)
    if len(files) <= MOST_SHOWN:
        return list(files)
    first = next(iter(files.values()))
    pp = read_rank(first).about["pp"]
    axes = Axes(pp=pp, dp=len(files) // pp)
    return sorted({axes.rank(pp=stage) for stage in range(pp)} | profiles(first.parent).keys())


def read(folder: str | Path, only: Collection[int] | None = None) -> Iterator[RankRecord]:
    """Yield what the ranks of a folder recorded, or `only` these, one after the other.

    Raises:
        UserError: as `rank_files` and `read_rank`, or a file of another recording.
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
    """Check that a rank's file is of the same recording as the first.

    Raises:
        UserError: it is not.
    """
    for key in ("first_step", "measured_steps", "schedule", "pp", "micro_batches"):
        if rank.about[key] != first.about[key]:
            raise UserError(
                f"{path}: {key} is {rank.about[key]!r}, rank {first.rank}'s is {first.about[key]!r}; the files are of "
                "several recordings: record into an empty folder"
            )


def read_rank(path: Path) -> RankRecord:
    """Read the file of one rank.

    Raises:
        UserError: it is cut short, or no such file.
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
        assert found.schedule.name in NAMES and min(data["first_step"], data["measured_steps"], data["pp"]) > 0
        assert world % data["pp"] == 0
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        what = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else error.strerror
        raise UserError(
            f"{path}: is not a whole record of a rank's steps ({what}); copy it again, or record again"
        ) from None
    if not any(event.what == "step" for event in events):
        raise UserError(f"{path}: holds no whole step; let the run go on beyond logging.trace_step, or record again")
    return found


def profiles(where: Path) -> dict[int, Path]:
    """Return the files of torch's profiler beside the ranks' files in `where`, by rank."""
    return {int(match[1]): path for path in sorted(where.iterdir()) if (match := _PROFILE.fullmatch(path.name))}


def read_profile(path: Path) -> list[dict[str, Any]]:
    """Return the events of a file of torch's profiler.

    Raises:
        UserError: it is cut short, or no such file.
    """
    try:
        content = path.read_bytes()
        data = json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
        events = data["traceEvents"]
        return [event for event in events if isinstance(event, dict)]
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: is not a whole file of torch's profiler ({error}); record again") from None
