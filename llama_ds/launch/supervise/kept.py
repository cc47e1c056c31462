"""Ranks without a fault leave an attempt that another rank has broken, and go on in the next one as the same processes.

They are asked over their heartbeat's connection, and have a bounded time (`job/departure.py` has their side). The
connection of a rank that has left stays open: over it the rank gets the next attempt, and if it closes, the rank ends.
All other ranks are killed, and forked anew from the warm process of their host, which these were forked from too.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from llama_ds.errors import first_of
from llama_ds.job.folder import Job
from llama_ds.job.wire import Kind, as_json, frame
from llama_ds.launch.supervise import processes
from llama_ds.launch.supervise.events import Events
from llama_ds.launch.supervise.server import Member, Server

TICK_S = 0.02
MAX_NAMED = 8  # ranks that the log names for one reason
NOT_FORKED = "the warm process of its host has not forked it"
SEND_S = 5.0  # time for a rank that has left to take the next attempt


@dataclass
class KeptRank:
    """A process that has left its attempt."""

    rank: int  # in the attempt that it has left
    host: str
    local_rank: int
    pid: int
    connection: socket.socket
    joined: bool = False  # whether it belongs to the next attempt, also for who looks for its processes

    def join(self, request: Mapping[str, Any]) -> None:
        """Send the next attempt; a rank that cannot be reached has not joined in time."""
        self.connection.settimeout(SEND_S)
        with suppress(OSError):
            self.connection.sendall(frame(Kind.ASK, as_json({"do": "join", **request})))
        self.connection.setblocking(False)

    def has_joined(self) -> bool:
        """Return whether it has closed the connection, by which it says that it has joined, or has ended."""
        while not self.joined:
            try:
                self.joined = not self.connection.recv(1 << 16)  # heartbeats
            except BlockingIOError:
                return False
            except OSError:
                self.joined = True
        self.connection.close()
        return True


class KeptRanks:
    """The ranks of an attempt that have left it."""

    def __init__(self, folder: str, ranks: Iterable[KeptRank], ssh_port: int | None = None) -> None:
        """`folder` is that of the attempt that they have left: they have it in their environment until they join."""
        self._folder, self._ssh_port = folder, ssh_port
        self._waiting, self._taken = list(ranks), list[KeptRank]()

    @property
    def pids(self) -> dict[int, int]:
        """The process ids of those that are not to be killed, by rank in the attempt that they have left."""
        return {one.rank: one.pid for one in (*self._waiting, *self._taken)}

    def take(self, job: Job, lives: Callable[[KeptRank], bool]) -> dict[int, KeptRank]:
        """Return those that take part in an attempt, by rank there. Each keeps its host and its number on it."""
        numbers = _numbers_of(job)
        found = {numbers[key]: one for one in self._waiting if (key := (one.host, one.local_rank)) in numbers}
        self._taken = [one for one in found.values() if lives(one)]
        self._waiting = [one for one in self._waiting if one not in self._taken]
        return {rank: one for rank, one in found.items() if one in self._taken}

    def release(self) -> None:
        """End those that nobody has taken."""
        released, self._waiting = self._waiting, []
        self._kill(released, {one.rank: one.pid for one in self._taken})

    def stop(self) -> None:
        """End those that were taken, but have not joined."""
        self._kill([one for one in self._taken if not one.has_joined()], {})

    def _kill(self, ranks: list[KeptRank], spare: Mapping[int, int]) -> None:
        for one in ranks:
            one.connection.close()
        if ranks:
            processes.kill(list({one.host for one in ranks}), self._folder, self._ssh_port, spare)


def reasons_against(
    members: Mapping[int, Member], named: Iterable[int], forked: Callable[[str, int], bool]
) -> dict[int, str]:
    """Return the ranks that cannot be kept, and why. `named` are the cause of the failure.

    `forked` takes a host and a process id; it returns whether the host's present warm process has forked that process.
    """
    apart = set(named)

    def reason(member: Member) -> str:
        if not apart:
            return "the fault may be any rank's"
        if member.rank in apart:
            return "the fault is its own"
        if member.left or not member.connected:
            return "it has ended or is not heard"
        if member.failed and not member.waits:
            return "it has failed by itself"
        if member.about.get("can_leave") is not True:
            return "no rank on CUDA is kept (--keep-ranks): its device's state cannot be given up yet"
        return "" if forked(member.host, int(member.about["pid"])) else NOT_FORKED

    return {rank: text for rank, member in sorted(members.items()) if (text := reason(member))}


def leave(
    job: Job, server: Server, against: Mapping[int, str], leave_s: float, events: Events, ssh_port: int | None = None
) -> KeptRanks | None:
    """Ask ranks to leave their attempt, and wait up to `leave_s` seconds; return those that have.

    `against` are the ranks that are not asked, and why.
    """
    begin = time.monotonic()
    waiting = {rank: member for rank, member in server.members.items() if rank not in against}
    if not waiting:
        events.add("not kept", f"no rank is kept: {_in_words(against)}", problems=dict(against))
        return None
    server.ask("leave", list(waiting))
    local_ranks = {rank: key[1] for key, rank in _numbers_of(job).items()}
    left, why = list[KeptRank](), dict(against)
    while waiting and time.monotonic() < begin + leave_s:
        server.poll()
        reports, server.reports = server.reports, []
        for member, report in reports:
            if member.rank in waiting and report.get("what") == "stays":
                why[member.rank] = str(report.get("text"))
            elif member.rank in waiting and report.get("what") == "left":
                rank, connection = member.rank, server.detach(member.rank)
                if connection:
                    own = KeptRank(rank, member.host, local_ranks[rank], int(member.about["pid"]), connection)
                    left.append(own)
                    del waiting[rank]
        why |= {member.rank: "it has ended" for member in server.disconnected if member.rank in waiting}
        waiting = {rank: member for rank, member in waiting.items() if rank not in why}
        time.sleep(TICK_S)
    why |= dict.fromkeys(waiting, f"it has not left within {leave_s:g} s")
    text = f"{len(left)} of {job.world} ranks have left the attempt and take part in the next one"
    text += f"; {_in_words(why)}" if why else ""
    seconds = round(time.monotonic() - begin, 3)
    events.add("left", text, ranks=sorted(one.rank for one in left), problems=why, seconds=seconds)
    return KeptRanks(job.folder, left, ssh_port)


def _in_words(problems: Mapping[int, str]) -> str:
    ranks = dict[str, list[int]]()
    for rank, problem in sorted(problems.items()):
        ranks.setdefault(problem, []).append(rank)
    return "; ".join(
        f"rank{'s' if len(those) > 1 else ''} {first_of(those, MAX_NAMED)}: {problem}"
        for problem, those in ranks.items()
    )


def _numbers_of(job: Job) -> dict[tuple[str, int], int]:
    """Return the rank of each host and number on it."""
    found, seen = dict[tuple[str, int], int](), dict[str, int]()
    for rank, host in enumerate(job.rank_hosts):
        found[host, seen.get(host, 0)] = rank
        seen[host] = seen.get(host, 0) + 1
    return found
