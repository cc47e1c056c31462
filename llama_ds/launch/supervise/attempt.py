"""One start of a job's ranks: started by DeepSpeed's launcher, watched, and ended everywhere when it has gone wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_ds.job.folder import Job
from llama_ds.launch.command import Command, runner_environment
from llama_ds.launch.supervise import hang, processes
from llama_ds.launch.supervise.events import Events
from llama_ds.launch.supervise.hang_detector import HangDetector, HangLimits
from llama_ds.launch.supervise.server import Member, Server
from llama_ds.launch.supervise.spikes import Spike, SpikeRule

TICK_S = 0.5  # between two looks at the ranks
LAST_WORDS_S = 3.0  # after the first failure: another rank may turn out to have caused it, and logs are completed
LEAVE_S = 30.0  # for the launcher to end after its ranks
STACKS_S = 5.0  # for ranks to say where they are
LOG_LINES = 12  # of a log that is shown

DONE, MISTAKE, DIVERGENCE, FAILURE, DEATH, HOST_LOST, HANG, SPIKE, LAUNCHER = (
    *("done", "mistake", "divergence", "failure", "death", "host lost", "hang", "spike", "launcher"),
)


@dataclass
class Outcome:
    """How an attempt ended, and because of whom."""

    kind: str
    text: str
    step: int = 0
    ranks: list[int] = field(default_factory=list)  # the first that failed
    hosts: list[str] = field(default_factory=list)  # theirs
    spike: Spike | None = None
    unclean: list[str] = field(default_factory=list)  # hosts on which processes may be left


@dataclass(frozen=True)
class Watch:
    """What is watched for, and how."""

    patience: HangLimits = field(default_factory=HangLimits)
    silent_s: float = 15.0  # without a beat, after which a rank's host is looked at
    spikes: bool = False  # whether a loss spike ends the attempt


class Attempt:
    """The ranks of one start."""

    def __init__(
        self, job: Job, command: Command, server: Server, watch: Watch, events: Events, say: Callable[[str], None],
        ssh_port: int | None = None,
    ) -> None:  # fmt: skip
        """`server` listens where `job` says. `say` gets what rank 0 prints."""
        self.job, self.server, self.watch, self.events = job, server, watch, events
        self._command, self._say, self._ssh_port = command, say, ssh_port
        self._pace, self._spikes = HangDetector(watch.patience), SpikeRule()
        self._tail = Tail(str(job.log(0)))
        self._looks: dict[str, _Look] = {}  # under way, by host
        self._joined = False
        self._asked: str | None = None  # "save" or "end", to be passed on to the ranks
        self._broken: Member | None = None  # the first whose connection ended without a word
        self._first: Outcome | None = None  # what is known of the first failure
        self._first_at = 0.0
        self.ended_at = 0.0  # when the supervisor turned its back on the ranks

    def ask(self, what: str) -> None:
        """Have the ranks "save", or save and "end". For signal handlers."""
        self._asked = what

    def run(self) -> Outcome:
        """Start the ranks and return when they have ended, on all hosts."""
        self.server.expect(self.job.token(), self.job.world)
        Path(self._command.env_file).write_text(self._command.env_text, encoding="utf-8")
        launcher = self._start()
        self.events.add("attempt started", pid=launcher.pid, world=self.job.world, hosts=dict(self.job.hosts))
        try:
            outcome = self._watch(launcher)
        except BaseException:
            self._end(launcher)
            raise
        if outcome.spike is None:  # a spike's step is its first
            outcome.step = max(outcome.step, self._pace.step)
        if outcome.kind == HANG:
            self.events.add("detected", kind=HANG, ranks=[], hosts=[])  # whose fault it is takes some seconds more
            outcome = self._report_hang(outcome)
        outcome.unclean = self._end(launcher)
        self._relay()
        return outcome

    def _start(self) -> subprocess.Popen[bytes]:
        environment = runner_environment(self._command, os.environ, self.job.launcher)
        with open(self.job.launcher_log, "wb") as log:
            return subprocess.Popen(
                self._command.argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._command.working_folder,
                start_new_session=True,
            )

    def _watch(self, launcher: subprocess.Popen[bytes]) -> Outcome:
        ended_at: float | None = None
        while True:
            time.sleep(TICK_S)
            self.server.hear()
            self._relay()
            self._pass_on()
            outcome = self._judge()
            if outcome:
                return outcome
            if launcher.poll() is not None:
                # Ranks of other hosts may have something to say still.
                ended_at = ended_at or time.monotonic()
                if self._all_left():
                    return Outcome(DONE, "all ranks have ended as they should")
                if time.monotonic() - ended_at > LAST_WORDS_S and not self._looks:
                    return self._first or self._launcher_failed(launcher.returncode)
            elif self._all_left():
                ended_at = ended_at or time.monotonic()
                if time.monotonic() - ended_at > LEAVE_S:  # its ranks are done: what it waits for is not ours
                    return Outcome(DONE, "all ranks have ended as they should, the launcher was killed")

    def _all_left(self) -> bool:
        members = self.server.members
        return len(members) == self.job.world and all(member.left for member in members.values())

    def _relay(self) -> None:
        for line in self._tail.lines():
            if not line.startswith("error: "):  # the rank has told it too, and it is said as the end of the attempt
                self._say(line)

    def _pass_on(self) -> None:
        asked, self._asked = self._asked, None
        if asked:
            self.events.add("asked", f"asking the ranks to {asked}", what=asked)
            self.server.ask(asked)

    def _judge(self) -> Outcome | None:
        """Return what ends the attempt, if anything does."""
        members, now = self.server.members, time.monotonic()
        if not self._joined and len(members) == self.job.world:
            self._joined = True
            self.events.add("ranks joined", f"all {self.job.world} ranks are there")
        if spike := self._read_news():
            return spike
        while self.server.ends:
            member = self.server.ends.pop(0)
            self._broken = self._broken or member
            self._look_at(member.host)
        self._look_at_silent(now)
        self._read_looks()
        if self._first:
            waited = now - self._first_at
            return self._first if waited > LAST_WORDS_S and not (self._looks and waited < 5 * LAST_WORDS_S) else None
        if self._pace.look(members.values()) and members:
            text = f"no progress for {self._pace.still_s:.1f} s"
            return Outcome(HANG, text)
        return None

    def _read_news(self) -> Outcome | None:
        news, self.server.news = self.server.news, []
        for member, told in news:
            if told.get("what") == "loss":
                spike = self._spikes.take(int(told["step"]), float(told["loss"]))
                if spike and self.watch.spikes:
                    text = f"LOSS SPIKE: {spike.loss:.4f} at step {spike.step}, after {spike.before:.4f}"
                    return Outcome(SPIKE, text, spike.step, spike=spike)
            elif told.get("what") == "phase":
                self._pace.learn(int(told["phase"]), float(told["seconds"]))
            elif told.get("what") == "failure" and told.get("kind") != "echo":
                self._settle(_failure(member, told))
        return None

    def _settle(self, outcome: Outcome) -> None:
        """Take the first failure; a death explains those that other ranks have seen before it was known."""
        explains = self._first and self._first.kind == FAILURE and outcome.kind in (DEATH, HOST_LOST)
        if self._first is None:
            self._first_at = time.monotonic()
        if self._first is None or explains:
            self._first = outcome
            self.events.add("detected", kind=outcome.kind, ranks=outcome.ranks, hosts=outcome.hosts)

    def _look_at(self, host: str) -> None:
        if host not in self._looks:
            self._looks[host] = _Look(host, self.job.folder, self._ssh_port)

    def _look_at_silent(self, now: float) -> None:
        for rank in (now - self.server.last_beat > self.watch.silent_s).nonzero()[0]:
            member = self.server.members.get(int(rank))
            if member and not member.left and now - member.told_silent_at > self.watch.silent_s:
                member.told_silent_at = now
                self._look_at(member.host)

    def _read_looks(self) -> None:
        """Conclude from what hosts say of their processes. A rank whose process lives may come back."""
        for host, look in list(self._looks.items()):
            if look.found is None:
                continue
            del self._looks[host]
            own = [m for m in self.server.members.values() if m.host == host and not m.left]
            if look.found.problem:
                if all(not m.connected or self._is_silent(m) for m in own):
                    text = f"HOST LOST: {host} does not answer ({look.found.problem})"
                    self._settle(Outcome(HOST_LOST, text, ranks=[m.rank for m in own], hosts=[host]))
                continue
            living = look.found.answer["processes"]
            dead = [m for m in own if not (m.connected or m.failed) and str(m.about["pid"]) not in living]
            dead.sort(key=lambda m: (m is not self._broken, m.gone_at or 0))
            if dead:
                self._settle(self._died(dead[0]))

    def _is_silent(self, member: Member) -> bool:
        return time.monotonic() - self.server.last_beat[member.rank] > self.watch.silent_s / 2

    def _died(self, member: Member) -> Outcome:
        log = self.job.log(member.rank)
        text = (
            f"RANK DIED: rank {member.rank} on {member.host} (process {member.about['pid']}) ended without a word at "
            f"step {member.beat.step}: killed, by a person or for want of memory, or crashed; the end of {log}:\n"
            + last_lines(str(log))
        )
        return Outcome(DEATH, text, ranks=[member.rank], hosts=[member.host])

    def _launcher_failed(self, code: int) -> Outcome:
        log = str(self.job.launcher_log)
        if not self.server.members:
            text = f"no rank has started; DeepSpeed's launcher ended with code {code}; the end of {log}:\n"
            return Outcome(LAUNCHER, text + last_lines(log, 2 * LOG_LINES))
        absent = [r for r in range(self.job.world) if r not in self.server.members or not self.server.members[r].left]
        if all(rank in self.server.members and self.server.members[rank].connected for rank in absent):
            text = f"DeepSpeed's launcher ended with code {code} while {len(absent)} ranks were at work; "
            return Outcome(LAUNCHER, f"{text}the end of {log}:\n{last_lines(log)}")
        rank, host = absent[0], self.job.rank_hosts[absent[0]]
        shown = str(self.job.log(rank)) if rank in self.server.members else log
        text = (
            f"rank {rank} on {host} has not ended as it should, nor {len(absent) - 1} others; "
            f"DeepSpeed's launcher ended with code {code}; the end of {shown}:\n{last_lines(shown)}"
        )
        return Outcome(LAUNCHER, text, ranks=absent, hosts=[host])

    def _report_hang(self, outcome: Outcome) -> Outcome:
        """Ask every rank where it is, and say which one probably keeps the others waiting."""
        last_beat = {rank: float(self.server.last_beat[rank]) for rank in self.server.members}
        self.server.ask("stacks")
        looks = [_Look(host, self.job.folder, self._ssh_port, stacks=True) for host in self.job.hosts]
        deadline = time.monotonic() + STACKS_S
        while time.monotonic() < deadline or any(look.found is None for look in looks):
            self.server.hear()
            if all(m.stacks for m in self.server.members.values()) and all(look.found for look in looks):
                break
            time.sleep(0.1)
        hosts = {look.host: look.found for look in looks if look.found}
        report = hang.HangReport(self._pace.still_s, self._pace.bound())
        report.standings = hang.examine(self.job, self.server.members, hosts, last_beat, self.watch.silent_s)
        for rank, member in self.server.members.items():
            if member.stacks:
                self.job.stacks(rank).write_text(member.stacks, encoding="utf-8")
        Path(self.job.path("hang.json")).write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
        found = report.culprits
        text = f"{report.text()}\nall ranks: {self.job.path('hang.json')}, their stacks: {self.job.path('stacks')}"
        return replace(outcome, text=text, ranks=[s.rank for s in found], hosts=list({s.host: 0 for s in found}))

    def _end(self, launcher: subprocess.Popen[bytes]) -> list[str]:
        """End every process of this attempt on every host; return the hosts of which that is not certain."""
        begin = self.ended_at = time.monotonic()
        self.server.hear()
        self.server.dismiss()
        found = processes.kill(list(self.job.hosts), self.job.folder, self._ssh_port)
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        killed = {host: len(said.answer.get("killed", {})) for host, said in found.items() if said.answer.get("killed")}
        unclean = [host for host, said in found.items() if not said.clean]
        if killed or unclean:
            self.events.add("killed", processes=killed, unclean=unclean, seconds=round(time.monotonic() - begin, 3))
        return unclean


class _Look:
    """A look at a host's processes, under way."""

    def __init__(self, host: str, folder: str, ssh_port: int | None, stacks: bool = False) -> None:
        self.host = host
        self.found: processes.Host | None = None

        def look() -> None:
            self.found = processes.look([host], folder, stacks, ssh_port)[host]

        threading.Thread(target=look, daemon=True).start()


class Tail:
    """What is appended to a file, which need not be there yet."""

    def __init__(self, path: str) -> None:
        self._path, self._at, self._rest = path, 0, b""

    def lines(self) -> list[str]:
        """Return the lines that were completed since the last call."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._at)
                new = file.read()
        except OSError:
            return []
        self._at += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


def _failure(member: Member, told: dict[str, Any]) -> Outcome:
    kind, text = str(told.get("kind")), str(told.get("text"))
    if kind == MISTAKE:
        return Outcome(MISTAKE, text, ranks=[member.rank], hosts=[member.host])
    if kind == DIVERGENCE:
        return Outcome(DIVERGENCE, text, member.beat.step, ranks=[member.rank], hosts=[member.host])
    return Outcome(
        FAILURE, f"rank {member.rank} on {member.host} failed:\n{text}", ranks=[member.rank], hosts=[member.host]
    )


def last_lines(path: str, count: int = LOG_LINES) -> str:
    """Return the last lines of a file, indented."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.path.getsize(path) - (1 << 16), 0))
            lines = file.read().decode(errors="replace").splitlines()[-count:]
    except OSError as error:
        lines = [str(error)]
    return "\n".join(f"    {line}" for line in lines)
