"""Boards in threads of their own, so that a server that is slow or gone neither stops nor slows training."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Thread
from typing import Protocol

from llama_ds.job.run_end import RunEnd
from llama_ds.log import logger

MAX_WAITING = 10_000  # reports that wait for a slow board; later ones are dropped
REOPEN_S = 60.0  # delay before a board that could not be opened is tried again
CLOSE_S = 30.0  # time at the end of a run for its boards to take what waits


Values = Mapping[str, float] | Mapping[str, str]


def numbers(values: Values) -> dict[str, float]:
    """Return the values that are numbers."""
    return {name: value for name, value in values.items() if not isinstance(value, str)}


class Board(Protocol):
    """Receives the numbers of every line of metrics.jsonl, and texts; any exception means that these are lost."""

    def add(self, step: int, values: Values) -> None:
        """Show `values`, by name, at `step`; a board that takes no texts leaves them out."""

    def close(self, end: RunEnd) -> None:
        """Flush and close; `end` says how the run ends."""


class BackgroundBoard:
    """A board that a thread opens and fills. It logs its first failure, and at the end how many values were lost."""

    def __init__(self, name: str, open_board: Callable[[], Board]) -> None:
        self._name, self._open = name, open_board
        self._waiting: Queue[tuple[int, Values] | RunEnd] = Queue(MAX_WAITING)
        self._ending = False
        self._refused = self._lost = 0  # values; each is counted by one thread
        self._warned = False
        self._thread = Thread(target=self._work, name=f"board {name}", daemon=True)
        self._thread.start()
        atexit.register(close_boards, (self,), RunEnd.FAILED)  # for a program that ends without it

    def add(self, step: int, values: Values) -> None:
        """Hand over `values` and return at once."""
        try:
            self._waiting.put_nowait((step, values))
        except Full:
            self._refused += len(values)
            self._warn(f"{MAX_WAITING:,} reports wait for it")

    def end(self, end: RunEnd) -> bool:
        """Let the board close after what was handed over; return whether this is the first call."""
        first, self._ending = not self._ending, True
        while first:
            try:
                self._waiting.put_nowait(end)
                break
            except Full:  # make place: it is slow, or hangs
                with suppress(Empty):
                    report = self._waiting.get_nowait()
                    self._refused += 0 if isinstance(report, RunEnd) else len(report[1])
        return first

    def wait_for_end(self, seconds: float) -> None:
        """Wait until the board has closed, and log how many values were lost."""
        self._thread.join(seconds)
        unfinished = self._thread.is_alive()
        if unfinished:
            logger.warning("board %s: did not take its last values within %g s", self._name, CLOSE_S)
        if lost := self._refused + self._lost:
            more = "at least " if unfinished else ""
            logger.warning("board %s: %s%d values were dropped; metrics.jsonl has them", self._name, more, lost)

    def _work(self) -> None:
        board, open_at = self._opened(), time.monotonic() + REOPEN_S
        while not isinstance(report := self._waiting.get(), RunEnd):
            try:
                if board is None and time.monotonic() >= open_at:
                    board, open_at = self._opened(), time.monotonic() + REOPEN_S
                if board is None:
                    self._lost += len(report[1])
                else:
                    board.add(*report)
            except Exception as error:
                self._lost += len(report[1])
                self._warn(f"{type(error).__name__}: {error}")
        try:
            if board is not None:
                board.close(report)
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")

    def _opened(self) -> Board | None:
        try:
            return self._open()
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")
            return None

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            text = " ".join(problem.split())[:300]
            logger.warning("board %s: values are lost (%s); the run continues", self._name, text)


def close_boards(boards: Sequence[BackgroundBoard], end: RunEnd) -> None:
    """Close all boards in the state `end`, and wait at most `CLOSE_S` for them; boards that were closed stay so."""
    closing = [board for board in boards if board.end(end)]
    until = time.monotonic() + CLOSE_S
    for board in closing:
        board.wait_for_end(max(until - time.monotonic(), 0.0))
