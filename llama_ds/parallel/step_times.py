"""Breaks a rank's step time down into its own computation and its waits for other ranks.

All ranks take the same time for a step, so the step time does not reveal a slow rank; the time in which a rank waits
for no other rank does. Only waits and the optimizer are timed; computation is the rest of the step.

On CUDA, times are those of events on the device's stream, so a wait hidden by computation has length zero. Events are
read long after the device has passed them, without a synchronisation.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# The parts of a step. "earlier" and "later" are waits for messages with earlier and later stages. "between" is the time
# since the previous step: reports, agreements of the ranks, evaluations, saves.
PARTS = ("data", "compute", "earlier", "later", "collectives", "optimizer", "between")
DATA, COMPUTE, EARLIER, LATER, COLLECTIVES, OPTIMIZER, BETWEEN = range(len(PARTS))

PART_OF = {  # keys are event names of `llama_ds.parallel.trace`
    "wait data": DATA,
    "wait activation": EARLIER,
    "send grad": EARLIER,
    "wait grad": LATER,
    "send activation": LATER,
    "wait sends": COLLECTIVES,  # remaining sends after the reductions, usually none
    "wait reduction": COLLECTIVES,
    "wait tied": COLLECTIVES,
    "wait norm": COLLECTIVES,
    "wait weights": COLLECTIVES,
    "wait matrices": COLLECTIVES,
    "with collectives": COLLECTIVES,  # pp = 1: a backward in which DeepSpeed reduces, and its optimizer step
    "optimizer": OPTIMIZER,
    "orthogonalise": OPTIMIZER,
}


@dataclass(frozen=True)
class _Step:
    """The events of one step on CUDA, which the device may not have reached yet."""

    before: Any  # end of the previous step
    begin: Any
    end: Any
    spans: list[tuple[int, Any, Any]]  # part, begin, end


class StepTimes:
    """Sums the parts of each step between `begin` and `end`.

    The first step, which creates communicators and compiles, is left out, and so is a step after `pause`.
    """

    def __init__(self, cuda: bool) -> None:
        self.counting = False
        self._cuda = cuda
        self._rows: list[list[float]] = []  # nanoseconds of each part, by step
        self._sums = [0] * len(PARTS)  # nanoseconds of each part of the current step
        self._begin: Any = None
        self._before: Any = None
        self._spans: list[tuple[int, Any, Any]] = []
        self._unread: deque[_Step] = deque()
        self._free: list[Any] = []  # events for reuse: creating one takes longer than recording it

    def now(self) -> Any:
        """Return a timestamp of this moment."""
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
        """Count the span from the timestamp `begin` until now. Spans do not overlap."""
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
        """Leave out the next step."""
        self._before = None

    def take(self) -> np.ndarray:
        """Return the parts of the steps since the last call in microseconds: (steps, parts).

        On CUDA, steps that the device has not finished are returned by a later call.
        """
        self._read()
        rows, self._rows = self._rows, []
        return np.array(rows, dtype=np.float64).reshape(-1, len(PARTS)) / 1e3

    def _keep(self, sums: list[Any], whole: Any, between: Any) -> None:
        """Store a step's parts, all in nanoseconds."""
        sums[COMPUTE] = whole - sum(sums)
        sums[BETWEEN] = between
        self._rows.append(sums)

    def _read(self) -> None:
        """Store the steps on CUDA whose events the device has passed."""
        while self._unread and self._unread[0].end.query():
            step = self._unread.popleft()
            sums = [0.0] * len(PARTS)
            for part, begin, end in step.spans:
                sums[part] += begin.elapsed_time(end) * 1e6
            whole, between = step.begin.elapsed_time(step.end) * 1e6, step.before.elapsed_time(step.begin) * 1e6
            self._keep(sums, whole, between)
            # The step's end is not free: it is the next step's `before`.
            self._free += [step.before, step.begin, *(mark for _, *pair in step.spans for mark in pair)]
