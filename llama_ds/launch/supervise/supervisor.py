"""The life of a job: it restarts on good hosts from the newest checkpoint, a limited number of times."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.job.folder import VARIABLE, Job
from llama_ds.job.wall_time import job_start, seconds_left
from llama_ds.launch.command import Command, build, devices_export
from llama_ds.launch.job_files import prepare
from llama_ds.launch.preflight import Report
from llama_ds.launch.remote import is_local
from llama_ds.launch.rendezvous import Rendezvous, UnreachableHost, arrange
from llama_ds.launch.supervise import attempt as outcomes
from llama_ds.launch.supervise.ahead import Ahead
from llama_ds.launch.supervise.attempt import Attempt, Outcome, Watch
from llama_ds.launch.supervise.events import Events
from llama_ds.launch.supervise.host_pool import DRAINED, HostPool
from llama_ds.launch.supervise.kept import KeptRanks
from llama_ds.launch.supervise.norm_rises import before_spike
from llama_ds.launch.supervise.repeats import RepeatedFailures, reason
from llama_ds.launch.supervise.rewinds import rewind_overrides, skips_with
from llama_ds.launch.supervise.server import Server
from llama_ds.launch.supervise.standbys import Standbys, reason_against

MAX_BACKOFF_S = 300.0
ACCOUNTS_S = 5.0  # time for the account of the run, which a restart does without if it takes longer


@dataclass(frozen=True)
class LaunchSettings:
    """Settings for starting the ranks, equal in all attempts."""

    run_file: str
    overrides: Sequence[str]
    train: str  # path of llama_ds/train.py
    launcher: str = "pdsh"
    launcher_args: Sequence[str] = ()
    mpirun: str = ""  # path of the mpirun; "": the first beside the interpreter and on PATH
    exports: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)  # variables that reach the ranks in a file
    devices: Mapping[str, str] = field(default_factory=dict)  # CUDA_VISIBLE_DEVICES of hosts that need their own
    nic: str = ""
    master: str = ""
    master_port: int = 0
    listen: str = ""
    ssh_port: int | None = None
    beat_s: float = 5.0
    orphan_s: float = 60.0
    warm: bool = False  # whether restarts use warm processes
    leave_s: float = 0.0  # time for ranks without a fault to leave a broken attempt and be kept; 0: none is


@dataclass(frozen=True)
class ListedHosts:
    """The hosts of a job as its files have them: slots by host, and CUDA_VISIBLE_DEVICES of those that need it."""

    hosts: Mapping[str, int]
    spares: Mapping[str, int]
    devices: Mapping[str, str]


@dataclass(frozen=True)
class RestartLimits:
    """Limits of restarts. Only restarts without progress count: each new furthest step resets the count."""

    restarts: int = 0  # maximum number of restarts in a row without progress; 0: never restart
    backoff_s: float = 5.0  # pause before the second of them; doubles for each further one
    rewind_steps: int = 0  # steps to go back before a loss spike; 0: spikes are ignored
    skip_steps: int = 0  # steps of data to skip after going back


class Supervisor:
    """Runs one job to its end."""

    def __init__(
        self,
        run: RunConfig,
        start: LaunchSettings,
        host_pool: HostPool,
        watch: Watch,
        limits: RestartLimits,
        folder: Path,
        examine: Callable[[Mapping[str, int]], Report],
        print_line: Callable[[str], None],
        read_hosts: Callable[[], ListedHosts] | None = None,
        accounts: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """`folder` is the job's folder, and `print_line` prints a line on the console.

        `examine` runs the preflight. `read_hosts` reads the hostfiles again before a restart; None: they are as
        they were. `accounts` returns metrics of the run's time, which a restart hands to the ranks.
        """
        self.run, self.start, self.host_pool, self.watch, self.limits = run, start, host_pool, watch, limits
        self.folder, self._examine, self._print_line = folder, examine, print_line
        self._read_hosts = read_hosts
        self._accounts, self._threads = accounts, ThreadPoolExecutor(1)
        self._accounted: Future[dict[str, float]] | None = None
        self._job_start = job_start(os.environ)
        self.events = Events(folder / "events.jsonl", print_line)
        self._rewind_overrides: list[str] = []  # overrides of the last rewind, kept in all later attempts
        # (step, skipped steps of data): starts with the run file's list; each rewind adds to it.
        self._skips = [(skip.at_step, skip.steps) for skip in run.data.skip]
        self._rewind_id = int(time.time())  # differs from an earlier job's: the run ignores an id it has seen
        self._attempt: Attempt | None = None
        self._ahead: Ahead | None = None  # answers of hosts since the last failure
        self._repeats = RepeatedFailures()
        self._standbys = self._new_standbys() if start.warm and limits.restarts else None
        # Whether the next attempt starts from them: not after one that never trained. Others cannot be kept.
        self._warm = start.leave_s > 0
        self._kept: KeptRanks | None = None  # the ranks that have left the last attempt
        self._ending = False

    def ask(self, what: str) -> None:
        """Ask the ranks to "save", or to save and "end". Safe to call from signal handlers."""
        self._ending = self._ending or what == "end"
        if self._attempt:
            self._attempt.ask(what)

    def supervise(self) -> int:
        """Run the job to its end; return the exit code: 0 done or ended as asked, 1 given up, 2 user error."""
        hosts, number, in_a_row, furthest = dict(self.host_pool.hosts), 0, 0, 0
        server: Server | None = None
        self.events.add("job started", run=self.run.path, hosts=hosts, spares=self.host_pool.spares)
        try:
            while True:
                number += 1
                rendezvous = self._rendezvous(hosts, again=number > 1)
                self._ahead = None
                if isinstance(rendezvous, Rendezvous):
                    server = server or Server(self.start.listen or rendezvous.listen)
                    outcome = self._run_attempt(number, hosts, rendezvous, server)
                else:
                    outcome = rendezvous
                self._record(outcome)
                as_asked = outcome.kind in (outcomes.DONE, outcomes.ENDED)
                if as_asked or (self._ending and outcome.kind != outcomes.MISTAKE):
                    self.events.add("job ended", "")
                    return 0 if as_asked else 1
                in_a_row = 1 if outcome.step > furthest else in_a_row + 1
                furthest = max(furthest, outcome.step)
                code = self._exit_code(outcome, in_a_row)
                if code is not None:
                    return code
                hosts = self._prepare_restart(outcome, hosts, in_a_row)
        except UserError as error:
            self.events.add("gave up", f"error: {error}")
            return UserError.EXIT_CODE
        finally:
            if self._kept:
                self._kept.release()
            if self._standbys:
                self._standbys.close()
            if server:
                server.close()
            self.events.close()

    def _new_standbys(self) -> Standbys | None:
        if reason := reason_against(self.start.launcher, self.host_pool.all_hosts):
            self.events.add("cold start", f"restarts start Python anew: {reason}")
            return None
        return Standbys(self.folder, self.events, self.start.train, self.start.orphan_s, self.start.ssh_port)

    def _rendezvous(self, hosts: Mapping[str, int], again: bool) -> Rendezvous | Outcome:
        """Return the rendezvous; if a host that it needs does not answer at a restart, that is one more failure."""
        try:
            return (self._ahead.rendezvous(list(hosts)) if self._ahead else None) or self._arrange(list(hosts))
        except UserError as error:
            if not again:
                raise
            host = error.host if isinstance(error, UnreachableHost) else next(iter(hosts))
            return Outcome(outcomes.HOST_LOST, f"HOST LOST: {error}", hosts=[host])

    def _arrange(self, hosts: list[str]) -> Rendezvous:
        start = self.start
        return arrange(hosts, start.nic, start.master_port, start.master, start.ssh_port)

    def _run_attempt(self, number: int, hosts: dict[str, int], rendezvous: Rendezvous, server: Server) -> Outcome:
        start = self.start
        job = Job(
            folder=str(self.folder / f"attempt_{number:02d}"),
            hosts=hosts,
            launcher=start.launcher,
            server=server.address,
            beat_s=start.beat_s,
            orphan_s=start.orphan_s,
            nic=start.nic,
            started=self._job_start.at,
            accounts=self._known_accounts(),
            keeps_ranks=start.leave_s > 0 and self._standbys is not None,
        )
        prepare(job, [start.run_file, *start.overrides, *self._rewind_overrides], start.secrets)
        command = command_of(job, start, rendezvous)
        if self._standbys:
            self._standbys.wanted = self.host_pool.all_hosts
        self._attempt = Attempt(
            job, command, server, self.watch, self.events, self._print_line, start.ssh_port, self._standbys
        )
        if self._ending:
            return Outcome(outcomes.ENDED, "ended before the ranks were started; there was nothing to save")
        outcome = self._attempt.run(self._warm, self._kept)
        self._warm, self._kept = self._attempt.has_trained, None
        try:
            if self.limits.restarts and outcome.kind in outcomes.FAULTS and not self._ending:
                self._read_hosts_again()
                every = self.host_pool.all_hosts
                self._ahead = Ahead(list(hosts), lambda: self._examine(every), lambda: self._arrange(list(hosts)))
                if self._warm and start.leave_s:
                    self._kept = self._attempt.leave(outcome, start.leave_s)
        finally:
            outcome.unclean = self._attempt.end(self._kept)
        return outcome

    def _known_accounts(self) -> dict[str, float]:
        future = self._accounted
        return future.result() if future and wait([future], ACCOUNTS_S).done else {}

    def _read_hosts_again(self) -> None:
        """Take in hosts that were added to the hostfiles, and leave out those that were removed."""
        if not self._read_hosts:
            return
        try:
            now = self._read_hosts()
        except UserError as error:
            self.events.add("hostfile", f"HOSTFILE: {error}; the job goes on with the hosts that it has")
            return
        if changes := self.host_pool.replace(now.hosts, now.spares):
            self.start = replace(self.start, devices=now.devices)
            self.events.add("hostfile", f"the hostfiles have changed: {changes}", hosts=now.hosts, spares=now.spares)

    def _record(self, outcome: Outcome) -> None:
        text = outcome.text if outcome.kind != outcomes.DONE else ""
        self.events.add(
            outcome.kind, text, step=outcome.step, ranks=outcome.ranks, hosts=outcome.hosts, unclean=outcome.unclean
        )

    def _exit_code(self, outcome: Outcome, in_a_row: int) -> int | None:
        """Return the exit code, or None if the job restarts."""
        rewinds = self.limits.rewind_steps > 0
        if outcome.kind == outcomes.MISTAKE or (outcome.kind == outcomes.DIVERGENCE and not rewinds):
            return UserError.EXIT_CODE
        if self.limits.restarts == 0:
            return 1
        if self._repeats.seen(outcome, other_hosts=bool(self.host_pool.spares)):
            self.events.add(
                "gave up",
                f"the same failure came again at step {outcome.step}, and would after another restart: "
                f"{reason(outcome)}; see {self.folder}, fix the cause and run the same command again",
            )
            return 1
        left = seconds_left(self.run.checkpoint, self._job_start)
        if left is not None and left <= 0:
            self.events.add(
                "gave up",
                f"no time for a restart is left of checkpoint.wall_time_s = {self.run.checkpoint.wall_time_s:g}; the "
                "same command resumes in another job",
            )
            return 1
        if in_a_row > self.limits.restarts:
            self.events.add(
                "gave up",
                f"{in_a_row - 1} restarts in a row got no further than step {outcome.step}; "
                f"see {self.folder}, fix the cause and run the same command again",
            )
            return 1
        return None

    def _prepare_restart(self, outcome: Outcome, hosts: dict[str, int], in_a_row: int) -> dict[str, int]:
        """Prepare the next attempt; return its hosts."""
        self._accounted = self._threads.submit(self._accounts)
        if outcome.kind in (outcomes.SPIKE, outcomes.DIVERGENCE):
            if self.run.logging.norms:  # now, because the next attempt drops the lines of steps that it repeats
                text = before_spike(Path(self.run.run_dir, "metrics.jsonl"), outcome.step)
                self.events.add("norms", text)
            self._rewind(outcome)
            chosen = hosts
        else:
            self._fence(outcome)
            # Wrong weights are a reason to drain a host, unless two hosts differ and either may be right.
            certain = outcome.kind == outcomes.CORRUPTION and len(outcome.hosts) == 1
            self.host_pool.blame(outcome.hosts, DRAINED if certain else 1.0)
            chosen = self._choose(hosts)
        pause = self._backoff_s(in_a_row)
        self.events.add("restart", f"starting again in {pause:g} s, restart {in_a_row} in a row", pause_s=pause)
        self._sleep(pause)
        return chosen

    def _backoff_s(self, in_a_row: int) -> float:
        """Return the pause before a restart: none after progress, since what failed has worked for some time."""
        return float(min(self.limits.backoff_s * 2 ** (in_a_row - 2), MAX_BACKOFF_S)) if in_a_row > 1 else 0.0

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._ending:
            time.sleep(0.1)

    def _choose(self, hosts: dict[str, int]) -> dict[str, int]:
        """Choose the hosts of the next attempt; retry if too few are good, as a network outage may be temporary."""
        for tries in range(1, self.limits.restarts + 1):
            try:
                return self._check_and_choose(hosts)
            except UserError as error:
                pause = self._backoff_s(tries + 1)
                self.events.add("too few hosts", f"{error}; checking again in {pause:g} s", pause_s=pause)
                self._sleep(pause)
            if self._ending:
                return hosts  # not used: no further attempt starts
        return self._check_and_choose(hosts)

    def _check_and_choose(self, hosts: dict[str, int]) -> dict[str, int]:
        report = (self._ahead.report() if self._ahead else None) or self._examine(self.host_pool.all_hosts)
        bad = [finding for finding in report.findings if finding.severity == "error"]
        self.events.add(
            "preflight", good=report.good, bad=[[f.host, f.check, f.text] for f in bad], strikes=self.host_pool.strikes
        )
        for finding in bad:
            self._print_line(f"PREFLIGHT: {finding.host}: {finding.check}: {finding.text}")
        chosen = self.host_pool.choose(report.good)
        out, into = [h for h in hosts if h not in chosen], [h for h in chosen if h not in hosts]
        before, after = sum(hosts.values()), sum(chosen.values())
        if into or out:
            text = f"hosts out: {', '.join(out) or 'none'}; in: {', '.join(into) or 'none'}"
            self.events.add("hosts changed", text, out=out, into=into)
        if before != after:
            self.events.add(
                "world changed",
                f"{after} ranks instead of {before}, with the same global batch",
                before=before,
                after=after,
            )
        return chosen

    def _fence(self, outcome: Outcome) -> None:
        """Wait until ranks on unreachable hosts have terminated themselves: two attempts must not write at once."""
        if not outcome.unclean or self._attempt is None:
            return
        until = self._attempt.ended_at + self._attempt.job.fence_s
        seconds = max(until - time.monotonic(), 0.0)
        self.events.add(
            "fence",
            f"{', '.join(outcome.unclean)}: unreachable; waiting {seconds:.1f} s until ranks there have terminated "
            "themselves",
            hosts=outcome.unclean,
            pause_s=round(seconds, 3),
        )
        time.sleep(seconds)

    def _rewind(self, outcome: Outcome) -> None:
        """Make the next attempt go back before the spike and skip the data that led to it."""
        # If no checkpoint is that old, the ranks report a user error, which ends the job; if there is no checkpoint at
        # all, the run starts from scratch. The minimum is step 1, because checkpoint.rewind_to = 0 means no rewind.
        back = max(outcome.step - self.limits.rewind_steps, 1)
        self._skips = skips_with(self._skips, back, self.limits.skip_steps)
        self._rewind_id += 1
        self._rewind_overrides = rewind_overrides(self._skips, back, self._rewind_id)
        self.events.add(
            "rewind", f"going back to step {back}, and skipping {self.limits.skip_steps} steps of data", to=back
        )


def command_of(job: Job, start: LaunchSettings, rendezvous: Rendezvous) -> Command:
    """Return the command that starts a job's ranks."""
    return build(
        launcher=start.launcher,
        hostfile=job.path("hostfile"),
        hosts=job.hosts,
        script=start.train,
        arguments_file=job.path("arguments"),
        master_addr=rendezvous.master,
        master_port=rendezvous.port,
        exports={**start.exports, VARIABLE: job.folder, **devices_export(job.hosts, start.devices)},
        env_file=job.path("environment"),
        nic=start.nic,
        ssh_port=start.ssh_port,
        launcher_args=start.launcher_args,
        mpirun=start.mpirun,
        own_address=start.listen or rendezvous.listen,
        ssh_args=os.environ.get("PDSH_SSH_ARGS_APPEND", ""),
        force_multi=not all(is_local(host) for host in job.hosts),
        python=sys.executable,
        working_folder=os.path.realpath(os.getcwd()),
    )
