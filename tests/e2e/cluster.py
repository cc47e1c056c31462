"""A job on real hosts: starts tools/launch.py, injects faults, and inspects the job's files and processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from launching import ROOT, TRAIN, environment
from tiny_run import Run

from tests.hosts import Hosts

LAUNCH = str(ROOT / "tools" / "launch.py")
TIMEOUT_S = 600  # a start alone takes over a minute on a busy machine
# Steps of the tiny run take a few milliseconds, so timeouts are seconds here and minutes on a cluster.
QUICK = {
    "beat-s": 0.5,
    "silent-s": 3,
    "orphan-s": 24,
    "hang-min-s": 20,  # on a busy machine a step may take ten seconds
    "backoff-s": 0.2,
    "start-s": 300,
}


@dataclass
class Job:
    """A started tools/launch.py."""

    run: Run
    hosts: Hosts | None  # None: on this machine alone
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def folder(self) -> Path:
        """The job's folder, the newest of the run."""
        return sorted((self.run.dir / "jobs").iterdir())[-1]

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events recorded so far."""
        files = sorted((self.run.dir / "jobs").glob("*/events.jsonl"))
        lines = files[-1].read_text().splitlines() if files else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def named(self, event: str) -> list[dict[str, Any]]:
        """Return the events of a name."""
        return [e for e in self.events if e["event"] == event]

    @property
    def output(self) -> str:
        """The output printed so far."""
        return self.log.read_text(errors="replace")

    @property
    def step(self) -> int:
        """The last reported step."""
        path = self.run.dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def wait_for(self, what: Callable[[], Any], timeout_s: float = 300, pause_s: float = 0.1) -> Any:
        """Wait until `what` returns a true value, while the job runs."""
        deadline = time.monotonic() + timeout_s
        while not (found := what()):
            assert self.process.poll() is None, self.output[-4000:]
            assert time.monotonic() < deadline, self.output[-4000:]
            time.sleep(pause_s)
        return found

    def wait_for_steps(self, count: int) -> None:
        """Wait until the run has completed `count` more steps."""
        goal = self.step + count
        self.wait_for(lambda: self.step >= goal)

    def wait_for_save(self) -> None:
        """Wait until a checkpoint is being written, which takes some 10 ms."""
        self.wait_for(lambda: self.saves, pause_s=0.001)

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is being written, or an interrupted one is left."""
        folder = self.run.checkpoints
        return any(folder.glob("attempt_*/step_*"))

    def wait_for_attempt(self, number: int) -> None:
        """Wait until all ranks of an attempt have joined and completed a step, and the supervisor knows it.

        After an attempt of which it does not know that it trained, the next one starts new processes.
        """
        self.wait_for(lambda: len(self.named("ranks joined")) >= number)
        self.wait_for(lambda: self.has_begun(number))
        self.wait_for(lambda: "| loss " in self._log(number))
        self.wait_for(lambda: self._known_to_train(number))

    def _known_to_train(self, attempt: int) -> bool:
        names = [event["event"] for event in self.events]
        starts = [place for place, name in enumerate(names) if name == "attempt started"]
        return "progress" in names[starts[attempt - 1] :]

    def has_begun(self, attempt: int) -> bool:
        """Return whether an attempt has found the step that it starts from."""
        return "starting at step" in self._log(attempt) or "resumed at step" in self._log(attempt)

    def resumed_at(self, attempt: int) -> int:
        """Return the step at which an attempt has resumed."""
        found = re.search(r"resumed at step (\d+)", self._log(attempt))
        assert found, self._log(attempt)
        return int(found[1])

    def resumed_from_memory(self, attempt: int) -> tuple[int, int]:
        """Return the step that an attempt found in the memory of hosts, and how many ranks had it on their own."""
        found = re.search(r"MEMORY CHECKPOINT: step (\d+) is in .*; (\d+) of \d+ ranks have", self._log(attempt))
        assert found, self._log(attempt)
        return int(found[1]), int(found[2])

    def _log(self, attempt: int) -> str:
        path = self.folder / f"attempt_{attempt:02d}" / "logs" / "rank_00000.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def ranks(self, host: str) -> list[psutil.Process]:
        """Return the ranks on a host, by rank."""
        assert self.hosts
        every = self.hosts.processes(host, str(self.run.dir / "jobs"))
        found = [p for p in every if TRAIN in p.cmdline()[:4] and "RANK" in p.environ()]
        return sorted(found, key=lambda p: int(p.environ()["RANK"]))

    def finish(self) -> int:
        """Wait for the end of the job; return its exit code."""
        try:
            return self.process.wait(TIMEOUT_S)
        finally:
            self.kill()

    def leaks(self) -> list[str]:
        """Wait for the end of the job; return where its token was seen: a command line, an environment or a file."""
        found: set[str] = set()
        looked, token, secret = 0, Path(), b""
        deadline = time.monotonic() + TIMEOUT_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.output[-4000:]
            time.sleep(0.5)
            token = next(iter(self.run.dir.glob("jobs/*/attempt_01/token")), token)
            secret = secret or (token.read_bytes() if token.name else b"")
            for process in psutil.Process().children(recursive=True) if secret else ():  # those of hosts, too
                for part in ("cmdline", "environ"):
                    with suppress(OSError):
                        content = Path("/proc", str(process.pid), part).read_bytes()
                        looked += part == "environ" and any(
                            name in content for name in (b"\0RANK=", b"_COMM_WORLD_RANK=")
                        )
                        found.update([f"{part} {content!r}"] if secret in content else [])
        assert looked, "no rank was looked at"
        files = [self.log, *(path for path in (self.run.dir / "jobs").rglob("*") if path.is_file() and path != token)]
        return [*found, *(str(path) for path in files if secret in path.read_bytes())]

    def kill(self) -> None:
        """Kill all processes of the job."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in self.leftovers():
            process.kill()

    def left_running(self, timeout_s: float = 30) -> list[psutil.Process]:
        """Return the processes of the job that do not end within the time that a busy machine may take."""
        return psutil.wait_procs(self.leftovers(), timeout=timeout_s)[1]

    def leftovers(self) -> list[psutil.Process]:
        """Return the living processes of the job, wherever they are, other than tools/launch.py itself."""
        found = []
        for process in psutil.process_iter():
            try:
                words = " ".join(process.cmdline())
                alive = process.status() != psutil.STATUS_ZOMBIE and process.pid != self.process.pid
                if alive and str(self.run.dir / "jobs") in words + process.environ().get("LLAMA_DS_JOB", ""):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def slow_links(mbit: int) -> str:
    """Return the shell command by which a host's link, not its work, sets the pace of steps."""
    return f"tc qdisc add dev eth0 root tbf rate {mbit}mbit burst 16kb limit 4mb"


def start(run: Run, hosts: Hosts, names: Sequence[str], slots: int, *options: str, **changed: float | str) -> Job:
    """Start tools/launch.py on hosts; `changed` overrides options of QUICK."""
    hostfile = hosts.write_hostfile(run.file.with_suffix(".hosts"), slots, names)
    return _start(run, hosts, hostfile, options, changed)


def start_here(run: Run, slots: int, *options: str, **changed: float | str) -> Job:
    """Start tools/launch.py on this machine alone."""
    hostfile = run.file.with_suffix(".hosts")
    hostfile.write_text(f"localhost slots={slots}\n")
    return _start(run, None, hostfile, options, changed)


def _start(
    run: Run, hosts: Hosts | None, hostfile: Path, options: Sequence[str], changed: Mapping[str, float | str]
) -> Job:
    settings = QUICK | {name.replace("_", "-"): value for name, value in changed.items()}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    log = run.file.with_suffix(".out")
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, LAUNCH, str(run.file), "--hostfile", str(hostfile), *words, *options],
            cwd=ROOT,
            env={**environment(), **(hosts.environment if hosts else {})},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    return Job(run, hosts, process, log)


def send(process: psutil.Process, number: int) -> None:
    """Send a signal to a process of a host."""
    os.kill(process.pid, number)


def stop(process: psutil.Process) -> None:
    """Make a process hang."""
    send(process, signal.SIGSTOP)
