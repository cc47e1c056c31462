"""One start of a job's ranks: monitored, and killed on all hosts after a failure."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_ds.errors import UserError
from llama_ds.job.folder import Job
from llama_ds.launch.command import Command
from llama_ds.launch.supervise import hang, processes
from llama_ds.launch.supervise.deepspeed_ranks import DeepSpeedRanks, StartedRanks
from llama_ds.launch.supervise.events import Events
from llama_ds.launch.supervise.hang_detector import HangDetector, HangLimits
from llama_ds.launch.supervise.kept import KeptRanks, leave, reasons_against
from llama_ds.launch.supervise.logs import LOG_LINES, Tail, first_error, last_error, last_lines
from llama_ds.launch.supervise.progress_log import ProgressLog
from llama_ds.launch.supervise.server import Member, Server
from llama_ds.launch.supervise.spikes import Spike, SpikeRule
from llama_ds.launch.supervise.standbys import Standbys

TICK_S = 0.5  # polling interval
JOIN_TICK_S = 0.05  # the same until they train: to connect takes two of them, and the log times what follows
SETTLE_S = 3.0  # wait after the first failure: its cause may be reported later, and logs are completed
LAUNCHER_EXIT_S = 30.0  # time for the launcher to exit after its ranks
WAITING_S = 30.0  # interval between the lines that name ranks which have not connected
STACKS_S = 5.0  # time for ranks to report their stacks
ALL_LEFT = "all ranks exited cleanly"
NOT_JOINED = "ended before all ranks had joined; there was nothing to save"
REQUESTED = {"save": "save", "end": "save and end"}

DONE, ENDED, MISTAKE, DIVERGENCE, FAILURE, DEATH, HOST_LOST, HANG, SPIKE, LAUNCHER = (
    *("done", "ended", "mistake", "divergence", "failure", "death", "host lost", "hang", "spike", "launcher"),
)
CORRUPTION = "corruption"
FAULTS = (FAILURE, DEATH, HOST_LOST, HANG, LAUNCHER, CORRUPTION)  # reasons to choose hosts again


@dataclass
class Outcome:
    """The end of an attempt and its cause."""

    kind: str
    text: str
    step: int = 0
    ranks: list[int] = field(default_factory=list)  # the ranks that failed first
    hosts: list[str] = field(default_factory=list)  # the hosts of these ranks
    spike: Spike | None = None
    unclean: list[str] = field(default_factory=list)  # hosts on which processes may still run


@dataclass(frozen=True)
class Watch:
    """Settings of failure detection."""

    hang_limits: HangLimits = field(default_factory=HangLimits)
    silent_s: float = 15.0  # after this time without a heartbeat, the rank's host is checked
    spikes: bool = False  # whether a loss spike ends the attempt


class Attempt:
    """The ranks of one start of the job."""

    def __init__(
        self,
        job: Job,
        command: Command,
        server: Server,
        watch: Watch,
        events: Events,
        print_line: Callable[[str], None],
        ssh_port: int | None = None,
        standbys: Standbys | None = None,
    ) -> None:
        """`server` listens on the address in `job`. `print_line` receives rank 0's output.

        `standbys` are the job's warm processes, None to have none.
        """
        self.job, self.server, self.watch, self.events = job, server, watch, events
        self._command, self._print_line, self._ssh_port, self._standbys = command, print_line, ssh_port, standbys
        self._hang_detector, self._spikes = HangDetector(watch.hang_limits), SpikeRule()
        self._progress_log = ProgressLog(events)
        self._ranks: StartedRanks | None = None  # None before the start
        self._tail = Tail(str(job.log(0)))
        self._checks: dict[str, processes.HostCheck] = {}  # checks in flight, by host
        self._joined = False
        self._request: str | None = None  # "save" or "end", to be forwarded to the ranks
        self._ending = False  # whether the ranks were asked to end, or will be
        self._launcher_gone = ""  # how DeepSpeed's launcher ended while all ranks were running
        self._first_lost: Member | None = None  # the first rank whose connection broke without a goodbye
        self._failure: Outcome | None = None  # the first failure, as far as it is known
        self._failed_at = 0.0
        self._said = time.monotonic()  # last time at which missing ranks were named
        self.ended_at = 0.0  # time at which the supervisor closed the connections to the ranks

    def ask(self, what: str) -> None:
        """Ask the ranks to "save", or to save and "end". Safe to call from signal handlers."""
        self._ending = self._ending or what == "end"
        self._request = "end" if self._ending else what

    @property
    def has_trained(self) -> bool:
        """Whether the ranks came as far as training."""
        return self._progress_log.trains

    def run(self, warm: bool = False, kept: KeptRanks | None = None) -> Outcome:
        """Start the ranks, `warm` if they can be, and watch them until they have ended or failed; then call `end`.

        Ranks in `kept` that have no place in this attempt end.
        """
        self.server.expect(self.job.token(), self.job.world)
        Path(self._command.env_file).write_text(self._command.env_text, encoding="utf-8")
        forked = self._standbys.ranks_of(self.job, self._command, kept) if self._standbys and warm else None
        if kept:
            kept.release()
        self._ranks = forked or DeepSpeedRanks(self.job, self._command)
        try:
            about = self._ranks.begin()
            self.events.add("attempt started", **about, world=self.job.world, hosts=dict(self.job.hosts))
            outcome = self._watch(self._ranks)
        except BaseException:
            self.end()
            raise
        if outcome.spike is None:  # the outcome of a spike already has the spike's first step
            outcome.step = max(outcome.step, self._hang_detector.step)
        self._progress_log.close(self._hang_detector.step)
        if outcome.kind == HANG:  # finding the culprit takes some more seconds
            stalled_s = round(self._hang_detector.stalled_s, 3)
            self.events.add("detected", kind=HANG, ranks=[], hosts=[], after_s=stalled_s)
            outcome = self._report_hang(outcome)
        return outcome

    @property
    def _starter(self) -> str:
        return self._ranks.name if self._ranks else DeepSpeedRanks.name

    def _watch(self, launcher: StartedRanks) -> Outcome:
        ended_at: float | None = None
        while True:
            time.sleep(TICK_S if self.has_trained else JOIN_TICK_S)
            self.server.poll()
            self._relay()
            self._note_joined()
            if self._ending and not self._joined:
                return Outcome(ENDED, NOT_JOINED)
            self._forward_request()
            outcome = self._judge()
            if outcome:
                return outcome
            if (code := launcher.poll()) is not None:
                # Ranks of other hosts may still send a report.
                ended_at = ended_at or time.monotonic()
                if self._all_left():
                    return Outcome(LAUNCHER, self._launcher_gone) if self._launcher_gone else Outcome(DONE, ALL_LEFT)
                if time.monotonic() - ended_at > SETTLE_S and not self._checks and not self._outlived(code):
                    return self._with_cause(self._failure or self._launcher_failed(code))
            elif self._all_left():
                ended_at = ended_at or time.monotonic()
                if time.monotonic() - ended_at > LAUNCHER_EXIT_S:  # the ranks are done, so the launcher may be killed
                    return Outcome(DONE, f"{ALL_LEFT}, the launcher was killed")

    def _outlived(self, code: int) -> bool:
        """Return whether the ranks that have not left still run without their launcher, asked to save and end.

        The launcher is killed alone, or gets the signal that is meant for the whole job. A rank that hangs ends the
        attempt as a hang.
        """
        running = [m for m in self.server.members.values() if not m.left]
        if self._failure or not self._joined or not all(m.connected and not m.failed for m in running):
            return False
        if not self._ending and not self._launcher_gone:
            self._launcher_gone = (
                f"{self._starter} exited with code {code} while {len(running)} ranks were running, "
                "which have saved and ended"
            )
            self.server.ask("end")
        return True

    def _all_left(self) -> bool:
        members = self.server.members
        return len(members) == self.job.world and all(member.left for member in members.values())

    def _relay(self) -> None:
        for line in self._tail.lines():
            if not line.startswith("error: "):  # the rank also reports it, and it is printed as the attempt's outcome
                self._print_line(line)

    def _forward_request(self) -> None:
        request, self._request = self._request, None
        if request:
            self.events.add("asked", f"asking the ranks to {REQUESTED[request]}", what=request)
            self.server.ask(request)

    def _note_joined(self) -> None:
        if not self._joined and len(self.server.members) == self.job.world:
            self._joined = True
            self.events.add("ranks joined", f"all {self.job.world} ranks have connected")

    def _judge(self) -> Outcome | None:
        """Return the outcome if the attempt is over."""
        members, now = self.server.members, time.monotonic()
        if not self._joined and now - self._said > WAITING_S:
            self._said = now
            self._say_missing()
        if spike := self._read_reports():
            return spike
        while self.server.disconnected:
            member = self.server.disconnected.pop(0)
            self._first_lost = self._first_lost or member
            if self._ranks and self._ranks.has_exited(member.rank) and not member.failed:
                self._record_failure(self._died(member), member.disconnected_at)
            else:
                self._check_host(member.host)
        self._check_silent(now)
        self._read_checks()
        if self._failure:
            waited = now - self._failed_at
            certain = self._joined and self._failure.kind in (DEATH, HOST_LOST, CORRUPTION)  # no cause comes later
            settled = (certain or waited > SETTLE_S) and not (self._checks and waited < 5 * SETTLE_S)
            return self._with_cause(self._failure) if settled else None
        if self._hang_detector.update(members.values()) and members:
            text = f"no progress for {self._hang_detector.stalled_s:.1f} s"
            return Outcome(HANG, text)
        self._progress_log.update(self._hang_detector.step)
        if self._standbys and self._progress_log.has_begun:
            self._standbys.prepare(self._command)
        return None

    def _read_reports(self) -> Outcome | None:
        reports, self.server.reports = self.server.reports, []
        for member, report in reports:
            if report.get("what") == "loss":
                spike = self._spikes.take(int(report["step"]), float(report["loss"]))
                if spike and self.watch.spikes:
                    text = f"LOSS SPIKE: {spike.loss:.4f} at step {spike.step}, after {spike.before:.4f}"
                    return Outcome(SPIKE, text, spike.step, spike=spike)
            elif report.get("what") == "phase":
                self._hang_detector.learn(int(report["phase"]), float(report["seconds"]))
                self._progress_log.take(report)
            elif report.get("what") == "failure" and report.get("kind") != "echo":
                self._record_failure(_reported_failure(member, report, self.job.rank_hosts))
        return None

    def _record_failure(self, outcome: Outcome, since: float | None = None) -> None:
        """Record the first failure; a death replaces an exception that another rank reported because of it.

        `since` is the monotonic time of the last sign of life (None: now).
        """
        explains = self._failure and self._failure.kind == FAILURE and outcome.kind in (DEATH, HOST_LOST)
        if self._failure is None:
            self._failed_at = time.monotonic()
        if self._failure is None or explains:
            self._failure = outcome
            after_s = 0.0 if since is None else round(time.monotonic() - since, 3)
            self.events.add("detected", kind=outcome.kind, ranks=outcome.ranks, hosts=outcome.hosts, after_s=after_s)

    def _check_host(self, host: str) -> None:
        if host not in self._checks:
            self._checks[host] = processes.HostCheck(host, self.job.folder, self._ssh_port)

    def _check_silent(self, now: float) -> None:
        for rank in (now - self.server.last_beat > self.watch.silent_s).nonzero()[0]:
            member = self.server.members.get(int(rank))
            if member and not member.left and now - member.checked_at > self.watch.silent_s:
                member.checked_at = now
                self._check_host(member.host)

    def _read_checks(self) -> None:
        """Evaluate the finished host checks. A rank whose process lives may reconnect."""
        for host, check in list(self._checks.items()):
            if check.found is None:
                continue
            del self._checks[host]
            own = [m for m in self.server.members.values() if m.host == host and not m.left]
            if check.found.problem:
                if all(not m.connected or self._is_silent(m) for m in own):
                    text = f"HOST LOST: {host} does not answer ({check.found.problem})"
                    beats = [beat for m in own if (beat := float(self.server.last_beat[m.rank]))]
                    last_beat = max(beats, default=None)
                    self._record_failure(Outcome(HOST_LOST, text, ranks=[m.rank for m in own], hosts=[host]), last_beat)
                continue
            living = check.found.answer["processes"]
            dead = [m for m in own if not (m.connected or m.failed) and str(m.about["pid"]) not in living]
            dead.sort(key=lambda m: (m is not self._first_lost, m.disconnected_at or 0))
            if dead:
                self._record_failure(self._died(dead[0]), dead[0].disconnected_at)

    def _is_silent(self, member: Member) -> bool:
        return time.monotonic() - self.server.last_beat[member.rank] > self.watch.silent_s / 2

    def _died(self, member: Member) -> Outcome:
        log = self.job.log(member.rank)
        text = (
            f"RANK DIED: rank {member.rank} on {member.host} (process {member.about['pid']}) exited without a report "
            f"at step {member.beat.step}: killed (by a person or for lack of memory) or crashed; the end of {log}:\n"
            + last_lines(str(log))
        )
        return Outcome(DEATH, text, ranks=[member.rank], hosts=[member.host])

    def _say_missing(self) -> None:
        missing = [rank for rank in range(self.job.world) if rank not in self.server.members]
        hosts = list(dict.fromkeys(self.job.rank_hosts[rank] for rank in missing))
        named = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more hosts" if len(hosts) > 8 else "")
        text = f"waiting for {len(missing)} of {self.job.world} ranks, on {named}, the first is rank {missing[0]}"
        self.events.add("waiting", text, ranks=missing)

    def _with_cause(self, outcome: Outcome) -> Outcome:
        """Put first the error in the log of a rank that never connected: it could not report, and it ended others."""
        if outcome.kind not in (DEATH, LAUNCHER):
            return outcome
        for rank, host in enumerate(self.job.rank_hosts):
            if rank not in self.server.members and (error := last_error(str(self.job.log(rank)))):
                text = f"rank {rank} on {host} did not join: {error}\n{outcome.text}"
                return replace(outcome, text=text, ranks=[rank], hosts=[host])
        return outcome

    def _launcher_failed(self, code: int) -> Outcome:
        log = str(self.job.launcher_log)
        if not self.server.members:
            if code == UserError.EXIT_CODE and (error := first_error(log)):  # a rank ended before it was connected
                return Outcome(MISTAKE, error)
            text = f"no rank has started; {self._starter} exited with code {code}; the end of {log}:\n"
            return Outcome(LAUNCHER, text + last_lines(log, 2 * LOG_LINES))
        absent = [r for r in range(self.job.world) if r not in self.server.members or not self.server.members[r].left]
        rank, host = absent[0], self.job.rank_hosts[absent[0]]
        shown = str(self.job.log(rank)) if rank in self.server.members else log
        text = (
            f"rank {rank} on {host} and {len(absent) - 1} others did not exit cleanly; "
            f"{self._starter} exited with code {code}; the end of {shown}:\n{last_lines(shown)}"
        )
        return Outcome(LAUNCHER, text, ranks=absent, hosts=[host])

    def _report_hang(self, outcome: Outcome) -> Outcome:
        """Ask every rank for its stacks, and report the probable culprit."""
        last_beat = {rank: float(self.server.last_beat[rank]) for rank in self.server.members}
        self.server.ask("stacks")
        checks = [processes.HostCheck(host, self.job.folder, self._ssh_port, stacks=True) for host in self.job.hosts]
        deadline = time.monotonic() + STACKS_S
        while time.monotonic() < deadline or any(check.found is None for check in checks):
            self.server.poll()
            if all(m.stacks for m in self.server.members.values()) and all(check.found for check in checks):
                break
            time.sleep(0.1)
        hosts = {check.host: check.found for check in checks if check.found}
        report = hang.HangReport(self._hang_detector.stalled_s, self._hang_detector.bound())
        report.ranks = hang.examine(self.job, self.server.members, hosts, last_beat, self.watch.silent_s)
        for rank, member in self.server.members.items():
            if member.stacks:
                self.job.stacks(rank).write_text(member.stacks, encoding="utf-8")
        Path(self.job.path("hang.json")).write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
        culprits = report.culprits
        text = f"{report.text()}\nall ranks: {self.job.path('hang.json')}, their stacks: {self.job.path('stacks')}"
        hosts_of_culprits = list(dict.fromkeys(culprit.host for culprit in culprits))
        return replace(outcome, text=text, ranks=[culprit.rank for culprit in culprits], hosts=hosts_of_culprits)

    def leave(self, outcome: Outcome, leave_s: float) -> KeptRanks | None:
        """Let ranks without a fault leave this attempt within `leave_s`; return those that have. Then call `end`."""
        forked = self._standbys.has_forked if self._standbys else lambda *_: False
        against = reasons_against(self.server.members, outcome.ranks, forked)
        return leave(self.job, self.server, against, leave_s, self.events, self._ssh_port)

    def end(self, kept: KeptRanks | None = None) -> list[str]:
        """Kill every process of this attempt on every host, but those of `kept`.

        Returns:
            The hosts on which some may survive.
        """
        begin = self.ended_at = time.monotonic()
        if not self._ranks:
            return []
        self.server.poll()
        self.server.dismiss()
        self._ranks.stop()
        found = processes.kill(list(self.job.hosts), self.job.folder, self._ssh_port, kept.pids if kept else None)
        self._ranks.kill()
        killed = {host: len(those.answer["killed"]) for host, those in found.items() if those.answer.get("killed")}
        unclean = [host for host, those in found.items() if not those.clean]
        if killed or unclean or kept:
            self.events.add("killed", processes=killed, unclean=unclean, seconds=round(time.monotonic() - begin, 3))
        self._relay()
        return unclean


def _reported_failure(member: Member, report: dict[str, Any], rank_hosts: list[str]) -> Outcome:
    kind, text = str(report.get("kind")), str(report.get("text"))
    if kind == CORRUPTION:  # every rank reports it, and it names others
        ranks = [int(rank) for rank in report["ranks"]]
        hosts = list(dict.fromkeys(rank_hosts[rank] for rank in ranks))
        return Outcome(CORRUPTION, text, member.beat.step, ranks=ranks, hosts=hosts)
    if kind == MISTAKE:
        return Outcome(MISTAKE, text, ranks=[member.rank], hosts=[member.host])
    if kind == DIVERGENCE:
        return Outcome(DIVERGENCE, text, member.beat.step, ranks=[member.rank], hosts=[member.host])
    return Outcome(
        FAILURE, f"rank {member.rank} on {member.host} failed:\n{text}", ranks=[member.rank], hosts=[member.host]
    )
