"""Commands on the hosts of a job: side by side, over ssh, each host with its own time and its own failure.

Our ssh takes the arguments that pdsh is given: PDSH_SSH_ARGS_APPEND, such as "-F ssh_config".
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CONNECT_S = 5  # for a host to answer at all
# Handshakes cost a core some hundredths of a second: with hundreds at once on few cores, none ends within CONNECT_S.
AT_ONCE = 16 * (os.cpu_count() or 1)
HOLD_S = 3.0  # after which a host that has not answered keeps no other waiting
MAX_OUTPUT = 1 << 20  # bytes of an answer that are kept: a host may send garbage without end
LOCAL = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class HostAnswer:
    """What a host made of a command."""

    host: str
    code: int | None  # its exit code, ssh's 255 when the host was not reached, None: no answer in time
    out: str
    err: str
    seconds: float

    @property
    def problem(self) -> str | None:
        """Say why there is no good answer, None when there is one."""
        if self.code == 0:
            return None
        last = self.err.strip().splitlines()[-1:] or self.out.strip().splitlines()[-1:]
        said = last[0][:300] if last else "without a word"
        if self.code is None:
            return f"no answer within {self.seconds:.0f} s"
        return f"ssh: {said.removeprefix('ssh: ')}" if self.code == 255 else f"exit code {self.code}: {said}"


def is_local(host: str) -> bool:
    """Tell whether a hostfile's name means this machine, to which no ssh is needed."""
    return host in LOCAL or host == socket.gethostname()


def ssh_command(host: str, argv: Sequence[str], port: int | None = None) -> list[str]:
    """Return the command that runs `argv` on a host, without a question asked and without waiting for a dead one."""
    if is_local(host):
        return list(argv)
    options = ["BatchMode=yes", f"ConnectTimeout={CONNECT_S}", "ServerAliveInterval=5", "ServerAliveCountMax=2"]
    words = [word for option in options for word in ("-o", option)]
    words += ["-p", str(port)] if port else []
    words += shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return ["ssh", *words, "--", host, shlex.join(argv)]


def script_with(path: Path, request: str) -> bytes:
    """Return a script of ours with the text of its request put in, as its constant REQUEST, to be sent over stdin."""
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
    """Run a command on all hosts side by side and return their answers, in the hosts' order.

    `argv` and `stdin` may differ by host. A host that hangs costs its own `timeout_s` and nobody else's: at most
    AT_ONCE hosts are waited for, each of them `hold_s`, before others are asked. `done` is called with each answer as
    it comes.
    """
    answers: dict[str, HostAnswer] = {}
    asked: dict[str, float] = {}  # when, of hosts that have not answered
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
            while len(held := [at for at in asked.values() if at > time.monotonic() - hold_s]) >= AT_ONCE:
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
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # no terminal to ask for a password on, and one group to kill
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
    except OSError:  # it ended without reading
        pass
    code: int | None = process.wait()
    late = not timer.is_alive()
    timer.cancel()
    _kill(process)  # what it left behind may still hold the pipes
    for reader in readers:
        reader.join(1.0)
    seconds = time.monotonic() - begin
    out, err = (kept.get(name, b"").decode(errors="replace") for name in ("out", "err"))
    return HostAnswer(host, None if late and code == -signal.SIGKILL else code, out, err, seconds)


def _read(stream: object) -> bytes:
    """Read to the end, and keep the first bytes."""
    kept = b""
    while chunk := stream.read1(1 << 16):  # type: ignore[attr-defined]
        kept += chunk[: MAX_OUTPUT - len(kept)]
    return kept


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
