"""The supervisor's warm processes: one on each host, spares included, from which a restart forks its ranks.

`llama_ds/standby.py` is the process on the host. It is started after the first step of an attempt, so that it takes no
time of a start, by ssh or, on this machine, directly. Its stdin and stdout carry the messages: it listens nowhere. It
has a folder of the job in its environment, and ranks the attempt's, by which they are found and killed. It ends with
its connection, and so with this process, however that ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llama_ds.job.folder import VARIABLE, Job
from llama_ds.launch.command import Command, exported_by_runner, runner_environment
from llama_ds.launch.remote import AT_ONCE, in_allocation, is_local, ssh_command
from llama_ds.launch.supervise import processes
from llama_ds.launch.supervise.events import Events
from llama_ds.launch.supervise.kept import KeptRank, KeptRanks

READY_S = 60.0  # for a process to import everything while a restart waits for it
STARTED_S = 15.0  # for a process to fork its ranks
END_S = 5.0  # for processes to end by themselves
PAUSE_S = 0.5  # between starts of AT_ONCE of them
AGAIN_S = 15.0  # until a missing one is started again within an attempt; each time the double


class Standby:
    """The warm process of one host."""

    def __init__(self, host: str, argv: list[str], environment: Mapping[str, str], log: Path, code: int) -> None:
        """`code` is the `state_of_code` that it imports."""
        self.host, self.problem, self.code = host, "", code
        self.about: dict[str, Any] | None = None  # its answer "ready"
        self._exited: dict[int, int] = {}  # exit codes by process id
        self._ranks: dict[int, int] = {}  # ranks of the last start by process id: earlier ones may still be exiting
        self.started = True  # whether it has answered the last request to start ranks
        self._lock = threading.Lock()
        with open(log, "ab") as errors:
            self.process = subprocess.Popen(
                argv,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                start_new_session=True,
            )
        threading.Thread(target=self._read, name=f"standby {host}", daemon=True).start()

    def send(self, **values: Any) -> None:
        """Send a request; an error shows when the answers end."""
        assert self.process.stdin
        with self._lock, suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(values).encode() + b"\n")

    @property
    def codes(self) -> dict[int, int]:
        """The exit codes of the ranks of the last start."""
        return {rank: self._exited[pid] for pid, rank in list(self._ranks.items()) if pid in self._exited}

    def start(self, request: Mapping[str, Any], kept: Mapping[int, int]) -> None:
        """Ask it to start ranks beside those in `kept`, by process id, that it has started for an earlier attempt."""
        self.started, self._ranks = not request["ranks"], dict(kept)
        if request["ranks"]:
            self.send(do="start", **request)

    def has_forked(self, pid: int) -> bool:
        """Return whether this is a process of its last start, and lives."""
        return pid in self._ranks and pid not in self._exited

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            try:
                answer = json.loads(line)
                if answer["what"] == "ready":
                    self.about = {"seconds": float(answer["seconds"]), "mib": int(answer["mib"])}
                elif answer["what"] == "started":
                    for rank, pid in answer["ranks"].items():
                        self._exited.pop(int(pid), None)  # an earlier process may have had this id
                        self._ranks[int(pid)] = int(rank)
                    self.started = True
                elif answer["what"] == "exited":
                    self._exited[int(answer["pid"])] = int(answer["code"])
                elif answer["what"] == "problem":
                    self.problem = str(answer["text"])[:300]
            except (ValueError, KeyError, TypeError):
                self.problem = f"it answers {line[:40]!r}; its shell must print nothing for commands"
        self.process.wait()
        self.problem = self.problem or f"it has ended with code {self.process.returncode}"


class WarmRanks:
    """Ranks that were forked from the warm processes of their hosts."""

    name = "the start from warm processes"

    def __init__(
        self,
        every: Standbys,
        own: list[Standby],
        request: Mapping[str, Any],
        job: Job,
        command: Command,
        kept: KeptRanks | None = None,
    ) -> None:
        """`request` is what all of them are asked. Ranks in `kept` that live are not forked anew."""
        self._every, self._standbys, self._world = every, own, job.world
        self._request, self._environments = request, rank_environments(job, command)
        self._kept, self._stays = kept, kept.take(job, self._lives) if kept else {}
        self._since = 0.0  # monotonic time of the start

    def begin(self) -> dict[str, Any]:
        """Ask for the ranks; return what the event log says of it."""
        self._since = time.monotonic()
        for one in self._standbys:
            new = [own for own in self._environments[one.host] if int(own["RANK"]) not in self._stays]
            stays = {known.pid: rank for rank, known in self._stays.items() if known.host == one.host}
            one.start({**self._request, "ranks": new}, stays)
        for own in (own for of_host in self._environments.values() for own in of_host):
            if known := self._stays.get(int(own["RANK"])):
                known.join({**self._request, "environment": {**self._request["environment"], **own}})
        return {"warm": True, **({"kept": sorted(self._stays)} if self._stays else {})}

    def poll(self) -> int | None:
        """Return the exit code of all ranks, or of the first that has failed; None while they run."""
        if any(self._has_not_started(one) for one in self._standbys) or self._is_late():
            return 1
        codes = [code for one in self._standbys for code in one.codes.values()]
        failed = next((code for code in codes if code), 0)
        return failed if failed or len(codes) == self._world else None

    def has_exited(self, rank: int) -> bool:
        """Return whether a rank has exited."""
        return any(rank in one.codes for one in self._standbys)

    def stop(self) -> None:
        """Let no more ranks start."""
        self._every.drop([one for one in self._standbys if not one.started])
        if self._kept:
            self._kept.stop()

    def kill(self) -> None:
        """Do nothing: the processes outlive the attempt."""

    def _lives(self, known: KeptRank) -> bool:
        return self._every.has_forked(known.host, known.pid)

    def _is_late(self) -> bool:
        """Return whether a rank that stays has not joined in time."""
        missing = [known for known in self._stays.values() if not known.has_joined()]
        return bool(missing) and time.monotonic() - self._since > STARTED_S

    def _has_not_started(self, one: Standby) -> bool:
        return not one.started and (bool(one.problem) or time.monotonic() - self._since > STARTED_S)


class Standbys:
    """The warm processes of a job."""

    def __init__(self, folder: Path, events: Events, train: str, silence_s: float, ssh_port: int | None = None) -> None:
        """`folder` is the job's folder. Processes end after hearing nothing for `silence_s` seconds."""
        self.wanted: dict[str, int] = {}  # the hosts that should have one, with their slots
        self._folder, self._events, self._train, self._ssh_port = folder, events, train, ssh_port
        self._silence_s = silence_s
        self._by_host: dict[str, Standby] = {}
        self._again: dict[str, tuple[float, float]] = {}  # by host: when to start it again, and the pause until then
        self._told: tuple[Any, Any] = {}, {}  # those that are ready and problems, as in the log
        self._closed = threading.Event()
        threading.Thread(target=self._keep_in_touch, name="standbys", daemon=True).start()

    @property
    def own_folder(self) -> str:
        """The value of the job's variable in their environments: no attempt's folder, so that they outlive attempts."""
        return str(self._folder / "standby")

    def prepare(self, command: Command) -> None:
        """Start those that are missing, again where a host did not answer and may be back, and log which are ready."""
        now = time.monotonic()
        missing = [host for host in self.wanted if not self._is_usable(host)]
        if due := [host for host in missing if now >= self._again.get(host, (now, 0.0))[0]]:
            self._start(due[:AT_ONCE], command)
        if any(not one.about and not one.problem for one in self._by_host.values()):
            return
        ready = {host: one.about for host, one in self._by_host.items() if one.about and not one.problem}
        problems = {host: one.problem for host, one in self._by_host.items() if one.problem}
        if (ready, problems) != self._told:
            self._told = ready, problems
            text = "".join(f"WARM PROCESS: {host}: {problem}\n" for host, problem in problems.items()).rstrip()
            self._events.add("warm processes", text, ready=ready, problems=problems)

    def ranks_of(self, job: Job, command: Command, kept: KeptRanks | None = None) -> WarmRanks | None:
        """Return the ranks of an attempt, to be started; None if a host has no warm process that is ready in time.

        Ranks in `kept` take part as they are if the present warm process of their host has forked them.
        """
        if outdated := self._outdated():
            self.drop(outdated)
            self._again.clear()
            text = "WARM PROCESS: the code has changed since they imported it; DeepSpeed's launcher starts the ranks"
            self._events.add("cold start", text, hosts=[one.host for one in outdated])
            return None
        missing = [host for host in job.hosts if not self._is_usable(host)]
        for begin in range(0, len(missing), AT_ONCE):
            time.sleep(PAUSE_S if begin else 0.0)
            self._start(missing[begin : begin + AT_ONCE], command)
        self._again.clear()
        chosen = [self._by_host[host] for host in job.hosts]
        deadline = time.monotonic() + READY_S
        while any(not one.about and not one.problem for one in chosen) and time.monotonic() < deadline:
            time.sleep(0.02)
        for one in chosen:
            if one.problem or not one.about:
                problem = one.problem or f"it is not ready after {READY_S:.0f} s"
                text = f"WARM PROCESS: {one.host}: {problem}; DeepSpeed's launcher starts the ranks"
                self._events.add("cold start", text, host=one.host)
                return None
        request = {
            "folder": command.working_folder,
            "argv": [self._train, f"@{job.path('arguments')}"],
            "log": str(job.launcher_log),
            "environment": command.exports,
        }
        return WarmRanks(self, chosen, request, job, command, kept)

    def has_forked(self, host: str, pid: int) -> bool:
        """Return whether the present warm process of a host has forked a process for the last attempt, which lives."""
        return self._is_usable(host) and self._by_host[host].has_forked(pid)

    def drop(self, unsure: list[Standby]) -> None:
        """Kill processes that may still start ranks of an attempt that has ended."""
        for one in unsure:
            _kill(one)
            self._by_host.pop(one.host, None)
        if unsure:
            processes.kill([one.host for one in unsure], self.own_folder, self._ssh_port)

    def close(self) -> None:
        """End all of them."""
        self._closed.set()
        for one in self._by_host.values():
            with suppress(OSError):
                one.process.stdin.close()  # type: ignore[union-attr]
        deadline = time.monotonic() + END_S
        for one in self._by_host.values():
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(max(deadline - time.monotonic(), 0.0))
        self.drop([one for one in self._by_host.values() if one.process.poll() is None])

    def _is_usable(self, host: str) -> bool:
        return host in self._by_host and not self._by_host[host].problem

    def _outdated(self) -> list[Standby]:
        code = state_of_code(self._train)
        return [one for one in self._by_host.values() if one.code != code]

    def _start(self, hosts: list[str], command: Command) -> None:
        code, now = state_of_code(self._train), time.monotonic()
        for host in hosts:
            pause = 2 * self._again.get(host, (now, AGAIN_S / 2))[1]
            self._again[host] = now + pause, pause
            script = os.path.join(os.path.dirname(self._train), "standby.py")
            own = {**command.exports, VARIABLE: self.own_folder}
            argv = [sys.executable, "-u", script, f"{self._silence_s:g}"]
            if is_local(host):
                environment = runner_environment(command, os.environ, "pdsh") | own
            else:
                words = {**exported_by_runner(os.environ), **own}
                argv = ["env", *(f"{name}={value}" for name, value in words.items()), *argv]
                environment = dict(os.environ)
            log = self._folder / "standby.log"
            self._by_host[host] = Standby(host, ssh_command(host, argv, self._ssh_port), environment, log, code)

    def _keep_in_touch(self) -> None:
        while not self._closed.wait(self._silence_s / 4):
            for one in list(self._by_host.values()):
                one.send(do="ping")


def reason_against(launcher: str, hosts: Mapping[str, int]) -> str:
    """Return why restarts cannot use warm processes, "" if they can."""
    if launcher != "pdsh":
        return f"--launcher {launcher} places the ranks itself"
    if any(in_allocation(host) for host in hosts):
        return "a step of Slurm beside the job's has no devices of its own"
    return ""


def state_of_code(train: str) -> int:
    """Return a number that changes with the Python files of the package, of which `train` is one."""
    found = []
    for folder, _, names in os.walk(os.path.dirname(train)):
        for path in (os.path.join(folder, name) for name in names if name.endswith(".py")):
            with suppress(OSError):  # being replaced
                about = os.stat(path)
                found.append((path, about.st_mtime_ns, about.st_size))
    return zlib.crc32(repr(sorted(found)).encode())


def rank_environments(job: Job, command: Command) -> dict[str, list[dict[str, str]]]:
    """Return the variables that DeepSpeed's launcher would set for each rank, by host."""
    found: dict[str, list[dict[str, str]]] = {}
    first = 0
    for number, (host, slots) in enumerate(job.hosts.items()):
        common = {
            "MASTER_ADDR": command.master_addr,
            "MASTER_PORT": str(command.master_port),
            "WORLD_SIZE": str(job.world),
            "CROSS_RANK": str(number),
            "CROSS_SIZE": str(len(job.hosts)),
            "LOCAL_SIZE": str(slots),
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(slots))),
        }
        found[host] = [common | {"RANK": str(first + one), "LOCAL_RANK": str(one)} for one in range(slots)]
        first += slots
    return found


def _kill(one: Standby) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(one.process.pid, signal.SIGKILL)
