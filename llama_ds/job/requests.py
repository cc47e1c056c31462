"""What is asked of this rank from outside: to save a checkpoint, or to end.

Signals ask for it, tools/launch.py does over the heartbeat's connection, and so does the watch of the launcher's
processes. `Requests` remembers it until the training loop takes it and agrees with the other ranks
(`llama_ds/training/interruptions.py`). As long as there is nothing to save and no other rank to agree with, a request
to end ends the process at once.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import IntEnum
from types import FrameType
from typing import Any, NoReturn

from llama_ds.job.departure import Departure
from llama_ds.job.run_end import RunEnd

# Variables in which launchers pass a process its rank; that of DeepSpeed and torchrun comes first.
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
# torchrun, MPICH and Intel MPI pass the signal that they receive on to their ranks; all others send SIGTERM for any.
_PASS_ON_THE_SAME = ("TORCHELASTIC_RUN_ID", "PMI_RANK")
# Signals that ask for an end however often they come: of a closed terminal, Ctrl-\, and those by which schedulers warn
# of a limit (LSF and Grid Engine send SIGUSR2, SIGXCPU comes every second). Their default is to end without a save.
WARNINGS = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2, signal.SIGXCPU)
COPY_S = 5.0  # time after a signal in which launchers may send their copies of it
JOIN_S = 5.0  # time that ranks have to join after a request to end
CLOSE_S = 10.0  # time to close outputs before a process ends by an error or at once


def warnings_heard() -> list[signal.Signals]:
    """Return the signals of `WARNINGS` that whoever started this process does not have it ignore, as nohup does."""
    return [number for number in WARNINGS if signal.getsignal(number) != signal.SIG_IGN]


class Request(IntEnum):
    """A request; the highest one on any rank wins."""

    NOTHING = 0
    SAVE = 1
    END = 2  # by SIGTERM, a signal of WARNINGS, the wall-time limit, tools/launch.py, or because the launcher has gone
    INTERRUPT = 3  # by SIGINT: as END, with exit code 130


class Stage(IntEnum):
    """What a request to end leads to."""

    ALONE = 0  # the process ends at once: there is nothing to save, and no other rank waits for this one
    JOINING = 1  # the ranks end together if they join within JOIN_S; otherwise this one ends
    TOGETHER = 2  # the ranks agree, save and end
    FINISHED = 3  # nothing: the run is over


class Requests:
    """Collects the requests to this rank."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """`environment` tells which launcher started this process, and whether it is the first rank."""
        self.reason = ""  # why the run is to end
        self.departure: Departure | None = None  # in a job by tools/launch.py: how this rank leaves its attempt
        self._stage, self._own = Stage.ALONE, Request.NOTHING
        self._launched = any(name in environment for name in RANK_VARIABLES)
        self._same = any(name in environment for name in _PASS_ON_THE_SAME)
        self._is_first = _is_first(environment)
        self._received: list[tuple[int, float]] = []  # signals that ask for an end, with their times
        self._lock = threading.RLock()
        self._before: dict[int, Any] = {}
        self._close: Callable[[RunEnd], object] | None = None

    def listen(self) -> None:
        """Handle the signals from now on, unless it does. Call it from the main thread.

        A thread handles them when the main thread cannot: Python runs handlers between two bytecodes of the main
        thread, which may be waiting in a library for another rank.
        """
        if self._before:
            return
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(writer, False)
        self._writer = writer
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *warnings_heard()]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        threading.Thread(target=self._serve, name="requests", daemon=True).start()

    def close(self) -> None:
        """Restore the handlers that were there before `listen`."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        signal.set_wakeup_fd(-1)
        os.close(self._writer)

    def enter(self, stage: Stage) -> None:
        """Enter a stage of this process."""
        with self._lock:
            self._stage = stage

    def keep(self) -> None:
        """From now on keep requests until the ranks agree on them."""
        self.enter(Stage.TOGETHER)

    def ask(self, request: Request, reason: str, code: int = 0, farewell: Callable[[], None] = lambda: None) -> None:
        """Remember a request, from any thread. If it ends the process at once: after `farewell`, with `code`."""
        with self._lock:
            if self._stage is Stage.FINISHED:
                return
            if request > self._own:
                self._own = request
                self.reason = reason if request >= Request.END else ""
            if request >= Request.END and self._stage is Stage.ALONE:
                self._end_alone(code, farewell)
            if request >= Request.END and self._stage is Stage.JOINING:
                timer = threading.Timer(JOIN_S, self._end_if_joining, (code, farewell))
                timer.daemon = True
                timer.start()

    def begin_again(self, environment: Mapping[str, str] = os.environ) -> None:
        """Forget the attempt that this rank has left, but not requests to end."""
        with self._lock:
            self.take()
            self._is_first, self._close = _is_first(environment), None
            self.enter(Stage.ALONE)

    def before_end(self, close: Callable[[RunEnd], object]) -> None:
        """Call `close` before this process ends by an error or at once: the exit skips atexit handlers."""
        self._close = close

    def close_outputs(self, end: RunEnd) -> None:
        """Close what `before_end` was given, within `CLOSE_S`; requests to end no longer matter.

        It runs in a thread, because a signal may have interrupted the main thread while it held a lock of an output.
        """
        with self._lock:  # whoever comes second waits for the end of the process
            close, self._close = self._close, None
            if close:
                self.enter(Stage.FINISHED)
                thread = threading.Thread(target=close, args=(end,), name="last outputs", daemon=True)
                thread.start()
                thread.join(CLOSE_S)

    @property
    def highest(self) -> Request:
        """The highest request."""
        return self._own

    @property
    def leaves(self) -> bool:
        """Whether this rank is to leave the attempt, which another rank has broken."""
        return self.departure is not None and self.departure.asked

    def take(self) -> Request:
        """Return the highest request, and forget it if it is a save."""
        with self._lock:
            own = self._own
            if own is Request.SAVE:
                self._own = Request.NOTHING
            return own

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._read()

    def _serve(self) -> None:
        while self._read():
            select.select([self._reader], [], [])
        os.close(self._reader)

    def _read(self) -> bool:
        """Handle the signals received since the last call; return whether more may come."""
        with self._lock:
            try:
                numbers = os.read(self._reader, 256)
            except BlockingIOError:  # the other thread was faster
                return True
            for number in numbers:
                self._receive(number)
            return bool(numbers)

    def _receive(self, number: int) -> None:
        if self._stage is Stage.FINISHED:
            return
        name = signal.Signals(number).name
        if number == signal.SIGUSR1:
            self.ask(Request.SAVE, name)
            return
        if number in WARNINGS:
            self.ask(Request.END, name, 128 + number)
            return
        earlier, now = list(self._received), time.monotonic()
        self._received.append((number, now))
        if earlier and self._is_insistent(earlier, number, now):
            self._leave(f"ended at once ({name} again); what was not yet saved is lost", 128 + number)
        if not earlier and self._stage is not Stage.ALONE:
            self._say(f"{name}: ending as soon as all ranks have agreed; a second {name} ends them at once")
        self.ask(Request.INTERRUPT if number == signal.SIGINT else Request.END, name, 128 + number)

    def _is_insistent(self, earlier: Sequence[tuple[int, float]], number: int, now: float) -> bool:
        """Return whether a signal is more than the launcher's copy of an earlier one."""
        if not self._launched:
            return True
        same = [when for other, when in earlier if other == number]
        if not same:
            return self._same
        copied = self._same or number == signal.SIGTERM
        return not copied or now - same[0] > COPY_S

    def _end_if_joining(self, code: int, farewell: Callable[[], None]) -> None:
        with self._lock:
            if self._stage is Stage.JOINING:
                self._end_alone(code, farewell)

    def _end_alone(self, code: int, farewell: Callable[[], None]) -> NoReturn:
        farewell()
        self._leave(f"ended before the first step ({self.reason}); there was nothing to save", code)

    def _leave(self, text: str, code: int) -> NoReturn:
        self._say(text)
        self.close_outputs(RunEnd.INTERRUPTED)
        os._exit(code)

    def _say(self, text: str) -> None:
        """Print a line on the first rank, without Python's buffers: the main thread may be using them."""
        if self._is_first:
            with suppress(OSError):
                os.write(2, f"{text}\n".encode())


def _is_first(environment: Mapping[str, str]) -> bool:
    return next((environment[name] for name in RANK_VARIABLES if name in environment), "0") == "0"
