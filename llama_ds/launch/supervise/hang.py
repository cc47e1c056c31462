"""Diagnosis of a hang: the state of every rank, and the rank that the others probably wait for."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from llama_ds.job.folder import Job
from llama_ds.launch.supervise.processes import HostProcesses
from llama_ds.launch.supervise.server import Member

_FRAME = re.compile(r'File "(?:.*/)?([^"/]+)", line (\d+),? in (\S+)')
INNERMOST = 4  # number of frames compared between stacks
RULES = (
    "its host does not answer",
    "its process is gone",
    "its process is stopped",
    "it does not report, so its Python does not run",
    "it computes while most ranks wait for others",
    "it has completed fewer steps than the others",
    "it is in another part of the step than most ranks",
)


@dataclass(frozen=True)
class RankState:
    """The state of a rank in the report."""

    rank: int
    host: str
    step: int
    phase: str
    doing: str
    waits: bool
    silent_s: float  # seconds since its last heartbeat
    state: str  # process state as in /proc: S sleeping, R running, T stopped; "?" unknown, "" no process
    where: tuple[str, ...]  # innermost frames of its main thread
    guilt: int | None  # index of the first of RULES that applies to it


@dataclass
class HangReport:
    """The states of all ranks, the most suspect ranks first."""

    stalled_s: float
    bound_s: float
    ranks: list[RankState] = field(default_factory=list)

    @property
    def culprits(self) -> list[RankState]:
        """The ranks to which the strongest rule applies."""
        strongest = min((rank.guilt for rank in self.ranks if rank.guilt is not None), default=None)
        return [rank for rank in self.ranks if strongest is not None and rank.guilt == strongest]

    def text(self) -> str:
        """Return the report for the console."""
        culprits = self.culprits
        step = max((rank.step for rank in self.ranks), default=0)
        lines = [f"HANG: no progress for {self.stalled_s:.1f} s at step {step} (the bound is {self.bound_s:.1f} s)"]
        if not culprits:
            lines.append("no rank stands out: all wait for each other")
        for rank in culprits[:8]:
            assert rank.guilt is not None
            last_seen = f"last seen {rank.doing or rank.phase} at step {rank.step}, {rank.silent_s:.1f} s ago"
            lines.append(f"probably because of rank {rank.rank} on {rank.host}: {RULES[rank.guilt]}, {last_seen}")
        if len(culprits) > 8:
            lines.append(f"and {len(culprits) - 8} more")
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        """Return the complete report."""
        rows = [asdict(rank) | {"reason": None if rank.guilt is None else RULES[rank.guilt]} for rank in self.ranks]
        return {
            "still_s": round(self.stalled_s, 3),
            "bound_s": round(self.bound_s, 3),
            "culprits": [rank.rank for rank in self.culprits],
            "ranks": rows,
        }


def examine(
    job: Job,
    members: Mapping[int, Member],
    hosts: Mapping[str, HostProcesses],
    last_beat: Mapping[int, float],
    silent_s: float,
) -> list[RankState]:
    """Return the state of each rank and the rule that applies to it; the most suspect ranks come first.

    `last_beat` is in monotonic seconds; a rank counts as silent after `silent_s`.
    """
    now = time.monotonic()
    states = {
        int(about["rank"]): str(about["state"])
        for host in hosts.values()
        for about in host.answer.get("processes", {}).values()
        if str(about.get("rank") or "").isdecimal() and "train.py" in about["command"]
    }
    answering = {host for host, found in hosts.items() if found.problem is None}
    frames = {rank: innermost(member.stacks or _stacks_file(job, rank)) for rank, member in members.items()}
    usual, votes = (
        Counter(where for where in frames.values() if where).most_common(1)[0] if any(frames.values()) else ((), 0)
    )
    max_step = max((member.beat.step for member in members.values()), default=0)
    waiting = sum(member.beat.waits for member in members.values()) * 2 > len(members)
    ranks = []
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
            bool(beat and beat.step < max_step),
            bool(frames.get(rank) and frames[rank] != usual and votes * 2 > len(members)),
        )
        guilt = next((number for number, sign in enumerate(signs) if sign), None)
        ranks.append(
            RankState(
                rank=rank,
                host=host,
                step=beat.step if beat else 0,
                phase=beat.phase.name.lower() if beat else "never connected",
                doing=beat.doing if beat else "",
                waits=bool(beat and beat.waits),
                silent_s=round(silent, 3) if member else 0.0,
                state=state,
                where=frames.get(rank, ()),
                guilt=guilt,
            )
        )
    return sorted(ranks, key=lambda rank: (len(RULES) if rank.guilt is None else rank.guilt, rank.rank))


def innermost(stacks: str) -> tuple[str, ...]:
    """Return the innermost frames of the main thread in a text of stacks, the innermost last.

    The fault handler writes the innermost frame first and the main thread last; its first line identifies it.
    """
    from_fault_handler = stacks.startswith(("Thread 0x", "Current thread 0x", "Fatal"))
    threads = [part for part in re.split(r"\n\s*\n", stacks.strip()) if part]
    if not threads:
        return ()
    lines = [(m[1], m[2], m[3]) for m in _FRAME.finditer(threads[-1] if from_fault_handler else threads[0])]
    if from_fault_handler:
        lines.reverse()
    return tuple(f"{file}:{line} {function}" for file, line, function in lines[-INNERMOST:])


def _stacks_file(job: Job, rank: int) -> str:
    try:
        return job.stacks(rank).read_text(errors="replace")
    except OSError:
        return ""
