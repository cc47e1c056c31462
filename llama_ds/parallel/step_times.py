"""Where a rank's steps go, in a few sums: its own computing, told from its waiting for others.

All ranks take the same time for a step, so that time tells nothing of who is slow. What does is the time that a rank
waits for nobody. Only the waits are timed, and the optimizer; computing is the rest of the step.

On CUDA the times are those at which the device passed events on its stream: a wait that computation hides lasts
nothing. They are read when the device has long passed them; nothing here waits for it.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# The parts of a step; "earlier" and "later" are waits for messages with earlier and later stages, "between" is what
# came between the step before and this one: reports, the ranks' agreements, evaluations, saves.
PARTS = ("data", "compute", "earlier", "later", "collectives", "optimizer", "between")
DATA, COMPUTE, EARLIER, LATER, COLLECTIVES, OPTIMIZER, BETWEEN = range(len(PARTS))

PART_OF = {  # by the names of `llama_ds.parallel.trace`
    "wait data": DATA,
    "wait activation": EARLIER,
    "send grad": EARLIER,
    "wait grad": LATER,
    "send activation": LATER,
    "wait sends": COLLECTIVES,  # what is left of them after the reductions: nothing, as a rule
    "wait reduction": COLLECTIVES,
    "wait tied": COLLECTIVES,
    "wait norm": COLLECTIVES,
    "wait weights": COLLECTIVES,
    "with collectives": COLLECTIVES,  # pp = 1: a backward that DeepSpeed reduces in, and its step
    "optimizer": OPTIMIZER,
}


@dataclass(frozen=True)
class _Step:
    """The marks of one step on CUDA, which the device may not have reached yet."""

    before: Any  # the end of the step before
    begin: Any
    end: Any
    spans: list[tuple[int, Any, Any]]  # part, begin, end


class StepTimes:
    """Adds up the parts of each step between `begin` and `end`.

    The first step is left out, which makes communicators and compiles, and so is one after a pause (`pause`).
    """

    def __init__(self, cuda: bool) -> None:
        self.counting = False
        self._cuda = cuda
        self._rows: list[list[float]] = []  # microseconds of each part, by step
        self._sums = [0] * len(PARTS)  # nanoseconds of the step under way
        self._begin: Any = None
        self._before: Any = None
        self._spans: list[tuple[int, Any, Any]] = []
        self._unread: deque[_Step] = deque()
        self._free: list[Any] = []  # events to use again: making one takes longer than recording it

    def now(self) -> Any:
        """Return a mark of this moment."""
        if not self._cuda:
            return time.monotonic_ns()
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """Begin a step."""
        self._read()
        self.counting, self._begin = True, self.now()

    def add(self, what: str, begin: Any) -> None:
        """Count what lasted from the mark `begin` until now. Such spans do not overlap."""
        if self._cuda:
            self._spans.append((PART_OF[what], begin, self.now()))
        else:
            self._sums[PART_OF[what]] += time.monotonic_ns() - begin

    def end(self) -> None:
        """End the step."""
        end = self.now()
        if self._before is not None and self._cuda:
            self._unread.append(_Step(self._before, self._begin, end, self._spans))
        elif self._before is not None:
            self._keep(self._sums, end - self._begin, self._begin - self._before)
        self.counting, self._before = False, end
        self._sums, self._spans = [0] * len(PARTS), []

    def pause(self) -> None:
        """Leave out the step that is next."""
        self._before = None

    def take(self) -> np.ndarray:
        """Return the parts of the steps that were not taken yet, in microseconds: (steps, parts).

        On CUDA those that the device is through with; the others come the next time.
        """
        self._read()
        rows, self._rows = self._rows, []
        return np.array(rows, dtype=np.float64).reshape(-1, len(PARTS)) / 1e3

    def _keep(self, sums: list[Any], whole: Any, between: Any) -> None:
        """Keep a step's parts, all in nanoseconds."""
        sums[COMPUTE] = whole - sum(sums)
        sums[BETWEEN] = between
        self._rows.append(sums)

    def _read(self) -> None:
        """Keep the steps on CUDA whose events the device has passed."""
        while self._unread and self._unread[0].end.query():
            step = self._unread.popleft()
            sums = [0.0] * len(PARTS)
            for part, begin, end in step.spans:
                sums[part] += begin.elapsed_time(end) * 1e6
            whole, between = step.begin.elapsed_time(step.end) * 1e6, step.before.elapsed_time(step.begin) * 1e6
            self._keep(sums, whole, between)
            # The step's end is still the next one's `before`.
            self._free += [step.before, step.begin, *(mark for _, *pair in step.spans for mark in pair)]
