"""A Slurm cluster on one Linux machine: slurmctld here, and slurmd on each host of `tests/hosts.py`, without systemd.

Needs root and Debian's packages slurm-wlm and munge, besides those of the hosts. Nobody is given an ssh configuration
for the hosts, so that nothing reaches them but Slurm.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from tests.hosts import Hosts
from tests.hosts import missing as hosts_missing

PROGRAMS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "srun": "slurm-wlm", "munged": "munge"}
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
TIMEOUT_S = 300.0


def missing() -> str | None:
    """Return the reason why this machine cannot start such a cluster, or None."""
    if reason := hosts_missing():
        return reason
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)})
    return f"not installed: {', '.join(absent)}" if absent else None


class Slurm:
    """A context in which the nodes node1, node2, ... accept jobs."""

    def __init__(self, count: int, folder: Path, subnet: int, cpus: int = 4) -> None:
        """Each node has `cpus` CPUs, whatever this machine has. Files go to `folder`."""
        self.folder, self._cpus = folder, cpus
        folder.mkdir(parents=True, exist_ok=True)
        daemon = f"SLURM_CONF={self.conf} slurmd -D -N $(hostname) >{folder}/slurmd_$(hostname).out 2>&1 &"
        names = f"mount --bind {folder}/hosts /etc/hosts"
        # slurmd looks for the machine's cgroups, which a network namespace's own /sys does not show; it uses none here.
        cgroups = "mount -t cgroup2 none /sys/fs/cgroup"
        if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
            named = "mkdir /sys/fs/cgroup/systemd; mount -t cgroup -o none,name=systemd none /sys/fs/cgroup/systemd"
            cgroups = f"mount -t tmpfs none /sys/fs/cgroup; {named}"
        before = f"export PATH=$PATH:/usr/sbin:/sbin; {names}; {cgroups}; {daemon}"
        self.hosts = Hosts(count, folder / "hosts.d", subnet, before)
        self._stack = ExitStack()

    def __enter__(self) -> Slurm:
        self._write_files()
        with ExitStack() as self._stack:
            socket_path = self.folder / "munge.sock"
            self._start(
                *("munged", "--foreground", "--force", f"--key-file={self.folder / 'key'}", f"--socket={socket_path}"),
                *(f"--{kind}-file={self.folder / f'munge.{kind}'}" for kind in ("pid", "log", "seed")),
            )
            wait_until(socket_path.exists, "munged has no socket")
            self._start("slurmctld", "-D")
            self._stack.enter_context(self.hosts)
            wait_until(self._ready, f"the nodes do not register: see {self.folder}")
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def conf(self) -> Path:
        """The cluster's configuration."""
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which Slurm's commands talk to this cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return kept | {"SLURM_CONF": str(self.conf)}

    def run(self, *command: object, **changes: str) -> str:
        """Run one of Slurm's commands; return its stdout."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words, env=self.environment | changes, capture_output=True, text=True, timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def submit(self, script: str, *options: str, **changes: str) -> str:
        """Submit a batch script; return the job's id. Its output goes to `output(id)`."""
        path = self.folder / f"job_{secrets.token_hex(4)}.sh"
        path.write_text(f"#!/bin/sh\n{script}")
        out = f"--output={self.folder}/%j.out"
        return self.run("sbatch", "--parsable", "--open-mode=append", out, *options, path, **changes).strip()

    def state(self, job: str) -> dict[str, str]:
        """Return what Slurm says of a job: JobState, ExitCode, Restarts ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def finish(self, job: str) -> dict[str, str]:
        """Wait for the end of a job; return its last state."""
        self.wait_for(job, lambda state: state["JobState"] in FINISHED, "does not end")
        return self.state(job)

    def wait_for(self, job: str, condition: Callable[[dict[str, str]], bool], problem: str) -> None:
        """Wait until the state of a job fulfils a condition; scontrol, which is asked, costs some 20 ms each time."""
        wait_until(lambda: condition(self.state(job)), f"job {job} {problem}:\n{self.output(job)}", pause_s=1.0)

    def output(self, job: str) -> str:
        """Return what a job has printed so far."""
        path = self.folder / f"{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def _ready(self) -> bool:
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%t").split()
        return lines == ["idle"] * len(self.hosts.names)

    def _start(self, *command: str) -> None:
        path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        program = shutil.which(command[0], path=path)
        assert program
        with open(self.folder / f"{command[0]}.out", "wb") as log:
            daemon = subprocess.Popen(
                [program, *command[1:]], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._stack.callback(daemon.wait)
        self._stack.callback(os.killpg, daemon.pid, signal.SIGKILL)

    def _write_files(self) -> None:
        (self.folder / "state").mkdir()
        (self.folder / "key").write_bytes(secrets.token_bytes(128))
        (self.folder / "key").chmod(0o400)
        addresses = {name: self.hosts.address(name) for name in self.hosts.names}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        nodes = [f"NodeName={n} NodeAddr={a} CPUs={self._cpus} State=UNKNOWN" for n, a in addresses.items()]
        settings = {
            "ClusterName": "tests",
            "SlurmctldHost": f"{socket.gethostname().partition('.')[0]}({self.hosts.machine})",
            "SlurmctldPort": f"{27000 + self.hosts.subnet}",  # here; the hosts have networks of their own
            "AuthInfo": f"socket={self.folder / 'munge.sock'},cred_expire=3",  # a requeued job waits for that long
            "SlurmUser": "root",
            "StateSaveLocation": str(self.folder / "state"),
            "SlurmdSpoolDir": f"{self.folder}/spool_%n",
            "SlurmctldPidFile": f"{self.folder}/slurmctld.pid",
            "SlurmdPidFile": f"{self.folder}/slurmd_%n.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SlurmdParameters": "config_overrides",  # nodes with more CPUs than this machine
            "JobRequeue": "1",
            "KillWait": "30",
            "MailProg": "/bin/true",
        }
        text = [f"{name}={value}" for name, value in settings.items()]
        partition = f"PartitionName=all Nodes={','.join(addresses)} Default=YES MaxTime=INFINITE State=UP"
        self.conf.write_text("\n".join([*text, *nodes, partition]) + "\n")


def wait_until(condition: Callable[[], object], problem: str, pause_s: float = 0.2) -> None:
    """Wait until a function returns something true."""
    until = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < until, problem
        time.sleep(pause_s)
