"""Why a job stands still: where every rank is, and which of them the others probably wait for."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from llama_ds.job.folder import Job
from llama_ds.launch.supervise.processes import Host
from llama_ds.launch.supervise.server import Member

_FRAME = re.compile(r'File "(?:.*/)?([^"/]+)", line (\d+),? in (\S+)')
INNERMOST = 4  # frames by which stacks are compared
RULES = (
    "its host does not answer",
    "its process is gone",
    "its process is stopped",
    "it does not report, so its Python does not run",
    "it is at work while most ranks wait for others",
    "it has done fewer steps than the others",
    "it is elsewhere than most ranks",
)


@dataclass(frozen=True)
class Standing:
    """A rank in the report."""

    rank: int
    host: str
    step: int
    phase: str
    doing: str
    waits: bool
    silent_s: float  # since its last beat
    state: str  # of its process, as in /proc: S sleeping, R running, T stopped; "?" not known, "" gone
    where: tuple[str, ...]  # innermost frames of its main thread
    guilt: int | None  # the first of RULES that speaks against it


@dataclass
class HangReport:
    """Where all ranks stand, those that are probably the cause first."""

    still_s: float
    bound_s: float
    standings: list[Standing] = field(default_factory=list)

    @property
    def culprits(self) -> list[Standing]:
        """The ranks against which the strongest rule speaks."""
        worst = min((s.guilt for s in self.standings if s.guilt is not None), default=None)
        return [s for s in self.standings if worst is not None and s.guilt == worst]

    def text(self) -> str:
        """Return the report for people."""
        found = self.culprits
        step = max((s.step for s in self.standings), default=0)
        lines = [f"HANG: no progress for {self.still_s:.1f} s at step {step} (the bound is {self.bound_s:.1f} s)"]
        if not found:
            lines.append("no rank stands out: all wait for each other")
        for s in found[:8]:
            assert s.guilt is not None
            said = f", last seen {s.doing or s.phase} at step {s.step}, {s.silent_s:.1f} s ago"
            lines.append(f"probably because of rank {s.rank} on {s.host}: {RULES[s.guilt]}{said}")
        if len(found) > 8:
            lines.append(f"and {len(found) - 8} more")
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        """Return the whole report."""
        rows = [asdict(s) | {"reason": None if s.guilt is None else RULES[s.guilt]} for s in self.standings]
        return {
            "still_s": round(self.still_s, 3),
            "bound_s": round(self.bound_s, 3),
            "culprits": [s.rank for s in self.culprits],
            "ranks": rows,
        }


def examine(
    job: Job, members: Mapping[int, Member], hosts: Mapping[str, Host], last_beat: Mapping[int, float], silent_s: float
) -> list[Standing]:
    """Return where each rank stands, with what speaks against it; those most suspected first.

    `last_beat` is in monotonic seconds; a rank counts as silent after `silent_s`.
    """
    now = time.monotonic()
    states = {
        int(about["rank"]): str(about["state"])
        for host in hosts.values()
        for about in host.answer.get("processes", {}).values()
        if str(about.get("rank") or "").isdecimal() and "train.py" in about["command"]
    }
    answering = {host for host, said in hosts.items() if said.problem is None}
    wheres = {rank: innermost(member.stacks or _written(job, rank)) for rank, member in members.items()}
    usual, votes = (
        Counter(where for where in wheres.values() if where).most_common(1)[0] if any(wheres.values()) else ((), 0)
    )
    most_steps = max((member.beat.step for member in members.values()), default=0)
    waiting = sum(member.beat.waits for member in members.values()) * 2 > len(members)
    standings = []
    for rank, host in enumerate(job.rank_hosts):
        member = members.get(rank)
        state = states.get(rank, "" if host in answering else "?")
        silent = now - last_beat[rank] if member else now
        beat = member.beat if member else None
        signs = (
            host not in answering and host in hosts,
            member is None or state == "",
            state in ("T", "t"),
            silent > silent_s,
            bool(beat and waiting and not beat.waits),
            bool(beat and beat.step < most_steps),
            bool(wheres.get(rank) and wheres[rank] != usual and votes * 2 > len(members)),
        )
        guilt = next((number for number, sign in enumerate(signs) if sign), None)
        standings.append(
            Standing(
                rank=rank,
                host=host,
                step=beat.step if beat else 0,
                phase=beat.phase.name.lower() if beat else "never connected",
                doing=beat.doing if beat else "",
                waits=bool(beat and beat.waits),
                silent_s=round(silent, 3) if member else 0.0,
                state=state,
                where=wheres.get(rank, ()),
                guilt=guilt,
            )
        )
    return sorted(standings, key=lambda s: (len(RULES) if s.guilt is None else s.guilt, s.rank))


def innermost(stacks: str) -> tuple[str, ...]:
    """Return the innermost frames of the first thread of a text of stacks, the innermost last.

    The fault handler writes the innermost first and the main thread last; it says so in its first line.
    """
    faults = stacks.startswith(("Thread 0x", "Current thread 0x", "Fatal"))
    threads = [part for part in re.split(r"\n\s*\n", stacks.strip()) if part]
    if not threads:
        return ()
    lines = [(m[1], m[2], m[3]) for m in _FRAME.finditer(threads[-1] if faults else threads[0])]
    if faults:
        lines.reverse()
    return tuple(f"{file}:{line} {function}" for file, line, function in lines[-INNERMOST:])


def _written(job: Job, rank: int) -> str:
    try:
        return job.stacks(rank).read_text(errors="replace")
    except OSError:
        return ""
