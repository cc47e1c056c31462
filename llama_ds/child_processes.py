"""Child processes of a tool: Ctrl-C reaches only the tool, which terminates its children before it exits."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

PIPE = subprocess.PIPE
# Handled like Ctrl-C while a child runs, because the child, in its own process group, does not receive them.
TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def run_child(command: Sequence[str], grace_s: float = 30.0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command like `subprocess.run`, in a process group of its own.

    On Ctrl-C, SIGTERM or SIGHUP the group receives SIGTERM, and SIGKILL after `grace_s` seconds or a second Ctrl-C.
    The group has terminated when KeyboardInterrupt is raised. Call this function from the main thread.
    """
    received: list[int] = []  # while the child is being created, when nobody could terminate it
    ignored = signal.getsignal(signal.SIGINT) != signal.default_int_handler
    numbers = TERMINATION_SIGNALS if ignored else (signal.SIGINT, *TERMINATION_SIGNALS)
    with (
        _handling(numbers, lambda number, _: received.append(number)),
        subprocess.Popen(command, start_new_session=True, text=True, **options) as process,
    ):
        try:
            for number in numbers:
                signal.signal(number, _interrupt)
            if received:
                raise KeyboardInterrupt
            output, _ = process.communicate()
        except BaseException:
            _terminate(process, grace_s)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output)


class ChildGroup:
    """Commands that threads run at the same time; a context manager of the main thread.

    On Ctrl-C, SIGTERM or SIGHUP, as on any other exception, all of them are ended as by `run_child`.
    """

    def __init__(self, grace_s: float = 30.0) -> None:
        self._grace_s, self._ended, self._lock = grace_s, False, threading.Lock()
        self._running: list[subprocess.Popen[str]] = []
        self._signals = ended_like_ctrl_c()

    def __enter__(self) -> ChildGroup:
        self._signals.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
        for process in self._running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._running:
            _terminate(process, self._grace_s)
        self._signals.__exit__(None, None, None)

    def run(self, command: Sequence[str], **options: Any) -> int:
        """Run a command in a process group of its own; return its exit code. A group that has ended starts nothing."""
        with self._lock:
            if self._ended:
                return -signal.SIGTERM
            process = subprocess.Popen(command, start_new_session=True, text=True, **options)
            self._running.append(process)
        code = process.wait()
        with self._lock:
            if not self._ended:
                self._running.remove(process)
        return code


@contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread on SIGTERM and SIGHUP, too, for cleaning up what was started."""
    with _handling(TERMINATION_SIGNALS, _interrupt):
        yield


@contextmanager
def _handling(numbers: Sequence[signal.Signals], handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Handle signals by `handler` inside the block, and as before after it."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _terminate(process: subprocess.Popen[str], grace_s: float) -> None:
    try:
        if grace_s:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(grace_s)
    except (KeyboardInterrupt, subprocess.TimeoutExpired, ProcessLookupError):
        pass
    finally:
        with suppress(ProcessLookupError):  # The whole group: its leader may have exited before the others.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Block SIGINT in the processes started inside the block; this process receives it after the block."""
    is_main = threading.current_thread() is threading.main_thread()
    received: list[int] = []  # the main thread handles a SIGINT that another thread has received
    handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number)) if is_main else None
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    if received:
        signal.raise_signal(signal.SIGINT)
