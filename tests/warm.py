"""Commands that start in no time: forked from one process of the test session that has imported what they need.

For tests that look at what a program does. Those that look at how processes are started, at what is imported or at
the memory of a whole process start Python itself.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import IO

from llama_ds.machine import free_port
from tests.forking import Request

ROOT = Path(__file__).resolve().parents[1]
SERVER = (sys.executable, str(ROOT / "tests" / "forking.py"))
SHARED = "TESTS_WARM_SERVER"  # environment variable, a path
SETTINGS = {
    **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    "HF_HUB_OFFLINE": "1",  # nothing that a test starts may need the network
}


class Process:
    """A started command, with as much of subprocess.Popen as tests use; it leads a session of its own."""

    def __init__(self, request: Request, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self.args = request.words
        self.returncode: int | None = None
        ours, theirs = os.pipe()
        self._answers = os.fdopen(ours, "rb", buffering=0)
        files = [stdout.fileno(), stderr.fileno(), theirs]
        socket.send_fds(_server(), [json.dumps(asdict(request)).encode()], files)
        os.close(theirs)
        self.pid = int(self._line())

    def _line(self) -> bytes:
        line = self._answers.readline()
        assert line, "the server of tests/forking.py has ended"
        return line

    def poll(self) -> int | None:
        """Return the exit code, None while the command runs."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.returncode = int(self._line())
            self._answers.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit code."""
        if self.returncode is None and not select.select([self._answers], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        """Kill it and all that it has started in its session."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()


@cache
def _server() -> socket.socket:
    """Start a server, which ends with this process, or connect to the one that `.ci/test` has started."""
    if path := os.environ.get(SHARED):
        shared = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        shared.connect(path)
        return shared
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = subprocess.Popen(
        [*SERVER, str(theirs.fileno())], cwd=ROOT, env=os.environ | SETTINGS, stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()], start_new_session=True,
    )  # fmt: skip
    theirs.close()

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


def start(
    words: Sequence[object], stdout: IO[bytes], *, ranks: int = 0, environment: Mapping[str, str] | None = None,
    stderr: IO[bytes] | None = None,
) -> Process:  # fmt: skip
    """Start `python WORDS`, or that many ranks of it, with this process's environment on a CPU, or another."""
    port = free_port() if ranks else 0
    request = Request([str(w) for w in words], dict(environment or os.environ | SETTINGS), str(ROOT), ranks, port)
    return Process(request, stdout, stderr or stdout)


def run(
    *words: object, ranks: int = 0, environment: Mapping[str, str] | None = None, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS`, or that many ranks of it, to its end."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = start(words, stdout, ranks=ranks, environment=environment, stderr=stderr)
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(process.args, code, *texts)


if __name__ == "__main__":
    os.execve(sys.executable, [*SERVER, *sys.argv[1:]], os.environ | SETTINGS)
