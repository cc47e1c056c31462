"""Small records of ranks that can be checked by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_ds.job.trace_format import FORMAT, RANK_FILE
from llama_ds.layout.axes import Coords
from llama_ds.perf.trace.read import Event, RankClock, RankRecord

ABOUT: dict[str, Any] = {
    "engine": "1f1b", "schedule": "1f1b", "pp": 2, "virtual_stages": 1, "extra_warmup": 0, "micro_batches": 1,
    "device": "cpu", "dtype": "fp32", "first_step": 7, "measured_steps": 1,
}  # fmt: skip


def rank(number: int, *events: Event, world: int = 2, dp_rank: int = 0, pp_rank: int = -1, **about: Any) -> RankRecord:
    """Return the record of a rank on `host<N>`; its pipeline stage defaults to its rank."""
    stage = number if pp_rank < 0 else pp_rank
    clock = RankClock(((0.0, 0.0, 0.0),))
    return RankRecord(
        number, world, f"host{number}", Coords(pp=stage, dp=dp_rank), {**ABOUT, **about}, clock, list(events)
    )


def two_ranks() -> list[RankRecord]:
    """Return one micro-batch on two stages: messages take 30, and the first rank's send blocks it for 5."""
    return [
        rank(
            0,
            Event("F", 0, 100, 0, 0),
            Event("send activation", 100, 105, 1, 0, size=8),
            Event("wait grad", 105, 460, 0, 0),
            Event("BW", 460, 660, 0, 0),
            Event("reduce", 640, 690),
            Event("wait reduction", 660, 690),
            Event("wait norm", 690, 692),
            Event("optimizer", 692, 700),
            Event("step", 0, 700),
            Event("wait weights", 700, 720),  # after the end of the step, so not a part of it
        ),
        rank(
            1,
            Event("wait activation", 0, 130, 1, 0),
            Event("F", 130, 230, 1, 0),
            Event("BW", 230, 430, 1, 0),
            Event("send grad", 430, 430, 0, 0, size=8),
            Event("reduce", 410, 450),
            Event("wait reduction", 430, 450),
            Event("wait norm", 450, 692),
            Event("optimizer", 692, 700),
            Event("step", 0, 700),
        ),
    ]


def later(recorded: RankRecord, by: float) -> RankRecord:
    """Return the record with all events delayed."""
    return replace(recorded, events=[e._replace(begin=e.begin + by, end=e.end + by) for e in recorded.events])


def write(folder: Path, ranks: list[RankRecord]) -> None:
    """Write the ranks' files as the trainer does."""
    for recorded in ranks:
        identity = {key: getattr(recorded, key) for key in ("rank", "world", "host")}
        identity |= {f"{axis}_rank": at for axis, at in recorded.coords.named.items()}
        content = {"format": FORMAT, **identity, **recorded.about, "clock": recorded.clock.points}
        text = json.dumps({**content, "events": recorded.events})
        (folder / RANK_FILE.format(recorded.rank)).write_text(text)
