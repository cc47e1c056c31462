"""Processes that a tool starts: Ctrl-C reaches the tool alone, and the tool ends them before it ends itself."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

PIPE = subprocess.PIPE
ENDED_BY = (signal.SIGTERM, signal.SIGHUP)  # taken like Ctrl-C while a child runs: it does not get them itself


def run_child(command: Sequence[str], grace_s: float = 30.0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command like `subprocess.run`, in a process group of its own.

    On Ctrl-C, SIGTERM or SIGHUP the group gets SIGTERM and `grace_s` seconds, then SIGKILL, as it does after a second
    Ctrl-C. It is gone when KeyboardInterrupt is raised. Call it from the main thread.
    """
    before = {number: signal.signal(number, _interrupt) for number in ENDED_BY}
    try:
        with subprocess.Popen(command, start_new_session=True, text=True, **options) as process:
            try:
                output, _ = process.communicate()
            except BaseException:
                _end(process, grace_s)
                raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(command, process.returncode, output)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _end(process: subprocess.Popen[str], grace_s: float) -> None:
    try:
        if grace_s:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(grace_s)
    except (KeyboardInterrupt, subprocess.TimeoutExpired, ProcessLookupError):
        pass
    finally:
        with suppress(ProcessLookupError):  # of the group: its first process may have ended before others
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Have the processes that are started within never receive SIGINT; this one does, after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
