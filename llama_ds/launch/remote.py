"""Commands on many hosts in parallel over ssh; each host has its own timeout and fails independently.

Hosts of the Slurm allocation in which this process runs are reached by srun instead, which needs no ssh. ssh gets the
same additional arguments as under pdsh: PDSH_SSH_ARGS_APPEND, such as "-F ssh_config".
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llama_ds.layout.nodelist import expand

CONNECT_S = 5  # ssh's connection timeout
# A handshake takes some 10 ms of a core: with hundreds at once on few cores, none would finish within CONNECT_S.
AT_ONCE = 16 * (os.cpu_count() or 1)
HOLD_S = 3.0  # a host without an answer occupies one of the AT_ONCE slots at most this long
MAX_OUTPUT = 1 << 20  # kept bytes of an answer: a host may send garbage without end
LOCAL = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class HostAnswer:
    """The result of a command on a host."""

    host: str
    code: int | None  # exit code; 255 from ssh if the host was not reached; None after a timeout
    out: str
    err: str
    seconds: float

    @property
    def problem(self) -> str | None:
        """The reason of a failure, or None."""
        if self.code == 0:
            return None
        last = self.err.strip().splitlines()[-1:] or self.out.strip().splitlines()[-1:]
        message = last[0][:300] if last else "no output"
        if self.code is None:
            return f"no answer within {self.seconds:.0f} s"
        return f"ssh: {message.removeprefix('ssh: ')}" if self.code == 255 else f"exit code {self.code}: {message}"


def is_local(host: str) -> bool:
    """Return whether a name in a hostfile means this machine, which needs no ssh."""
    return host in LOCAL or host == socket.gethostname()


def local_host(hosts: Iterable[str]) -> str | None:
    """Return the name of this machine among `hosts`, if it is one of them."""
    return next((host for host in hosts if is_local(host)), None)


def in_allocation(host: str) -> bool:
    """Return whether a host belongs to the Slurm allocation (sbatch, salloc) in which this process runs."""
    nodes = os.environ.get("SLURM_JOB_NODELIST", "") if "SLURM_JOB_ID" in os.environ else ""
    return bool(nodes and shutil.which("srun")) and host in _nodes(nodes)


@cache
def _nodes(nodelist: str) -> frozenset[str]:
    return frozenset(expand(nodelist, "SLURM_JOB_NODELIST"))


def ssh_command(host: str, argv: Sequence[str], port: int | None = None) -> list[str]:
    """Return the command that runs `argv` on a host, without prompts and with a timeout for a dead host."""
    if is_local(host):
        return list(argv)
    if in_allocation(host):
        # A step of one task beside those of the job, whatever the job's own variables ask for.
        one = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--distribution=block"]
        return ["srun", "--overlap", "--quiet", *one, "--mpi=none", "--export=ALL", f"--nodelist={host}", *argv]
    options = ["BatchMode=yes", f"ConnectTimeout={CONNECT_S}", "ServerAliveInterval=5", "ServerAliveCountMax=2"]
    words = [word for option in options for word in ("-o", option)]
    words += ["-p", str(port)] if port else []
    words += shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return ["ssh", *words, "--", host, shlex.join(argv)]


def script_with(path: Path, request: str) -> bytes:
    """Return the source of a script with `request` inserted as its constant REQUEST, to be sent over stdin."""
    head, future, rest = path.read_text(encoding="utf-8").partition("from __future__ import annotations\n")
    return f"{head}{future}REQUEST = {request!r}\n{rest}".encode()


def on_hosts(
    hosts: Sequence[str],
    argv: Sequence[str] | Mapping[str, Sequence[str]],
    stdin: bytes | Mapping[str, bytes] = b"",
    timeout_s: float = 20.0,
    port: int | None = None,
    done: Callable[[HostAnswer], None] | None = None,
    hold_s: float = HOLD_S,
) -> dict[str, HostAnswer]:
    """Run a command on all hosts in parallel and return their answers, in the order of `hosts`.

    `argv` and `stdin` may differ by host. A hanging host delays no other by more than `hold_s`: a new host is asked
    while fewer than AT_ONCE hosts have been waiting for less than `hold_s`. `done` is called with each answer.
    """
    answers: dict[str, HostAnswer] = {}
    asked: dict[str, float] = {}  # start time of each host without an answer
    change = threading.Condition()

    def ask(host: str) -> None:
        words = argv[host] if isinstance(argv, Mapping) else argv
        given = stdin[host] if isinstance(stdin, Mapping) else stdin
        answer = _run(host, ssh_command(host, words, port), given, timeout_s)
        with change:
            answers[host] = answer
            del asked[host]
            if done:
                done(answer)
            change.notify()

    threads = []
    for host in hosts:
        with change:
            while len(held := [start for start in asked.values() if start > time.monotonic() - hold_s]) >= AT_ONCE:
                change.wait(max(min(held) + hold_s - time.monotonic(), 0.001))
            asked[host] = time.monotonic()
        threads.append(threading.Thread(target=ask, args=(host,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return {host: answers[host] for host in hosts}


def _run(host: str, command: list[str], stdin: bytes, timeout_s: float) -> HostAnswer:
    begin = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            env=_environment(host),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # no terminal for a password prompt, and one process group to kill
        )
    except OSError as error:
        return HostAnswer(host, 255, "", f"{command[0]}: {error.strerror}", 0.0)
    timer = threading.Timer(timeout_s, _kill, (process,))
    timer.start()
    kept: dict[str, bytes] = {}
    readers = [
        threading.Thread(target=lambda n=name, s=stream: kept.update({n: _read(s)}), daemon=True)
        for name, stream in (("out", process.stdout), ("err", process.stderr))
    ]
    for reader in readers:
        reader.start()
    try:
        assert process.stdin
        process.stdin.write(stdin)
        process.stdin.close()
    except OSError:  # the process exited without reading stdin
        pass
    code: int | None = process.wait()
    late = not timer.is_alive()
    timer.cancel()
    _kill(process)  # child processes may still hold the pipes
    for reader in readers:
        reader.join(1.0)
    seconds = time.monotonic() - begin
    out, err = (kept.get(name, b"").decode(errors="replace") for name in ("out", "err"))
    return HostAnswer(host, None if late and code == -signal.SIGKILL else code, out, err, seconds)


def _environment(host: str) -> dict[str, str] | None:
    """Return the environment of a command: without ssh also without the SSH_CONNECTION of this shell's own login."""
    without_ssh = is_local(host) or in_allocation(host)
    return {k: v for k, v in os.environ.items() if k != "SSH_CONNECTION"} if without_ssh else None


def _read(stream: object) -> bytes:
    """Read to the end, and keep the first MAX_OUTPUT bytes."""
    kept = b""
    while chunk := stream.read1(1 << 16):  # type: ignore[attr-defined]
        kept += chunk[: MAX_OUTPUT - len(kept)]
    return kept


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
