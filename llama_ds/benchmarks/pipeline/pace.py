"""Paces the passes of an engine: each lasts at least a given time, most of which it sleeps.

Ranks that sleep do not compete for processors. So a machine with fewer cores than ranks shows what the schedule and the
links cost, and not the load of the machine. Every engine records its passes by `llama_ds.parallel.trace`, where the
rest of a pass is slept: the events then include it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from llama_ds.parallel.trace import Trace


class Pace:
    """Paces the passes that one rank records."""

    def __init__(self, trace: Trace, pass_s: Mapping[str, float]) -> None:
        """Take the seconds of a pass by the name of its event; those of other events stay as they are."""
        self.passes = self.late = 0  # late: computed longer than their pace
        self._pass_s = pass_s
        self._waits: list[tuple[float, float]] = []  # begin and length of waits within the pass, microseconds
        self._add = trace.add
        self._trace = trace
        vars(trace).update(now=self._now, mark=self._now, add=self._paced)

    def _now(self) -> float:
        return time.monotonic_ns() / 1e3

    def _paced(self, what: str, begin: Any = None, *details: Any, **named: Any) -> None:
        if what in self._pass_s:
            waited = sum(length for start, length in self._waits if start >= begin)
            self._waits.clear()
            left = self._pass_s[what] - (self._now() - begin - waited) / 1e6
            self.passes, self.late = self.passes + 1, self.late + (left < 0)
            time.sleep(max(left, 0))
        elif begin is not None and what.startswith("wait"):
            self._waits.append((begin, self._now() - begin))
        if self._trace.recording:
            self._add(what, begin, *details, **named)


def pass_seconds(pace_ms: Sequence[float], chunks: int) -> dict[str, float]:
    """Return the seconds of each kind of pass of one of a rank's `chunks` stages.

    Args:
        pace_ms: milliseconds of a rank's forward, input backward and weight backward of a micro-batch.
    """
    forward, inputs, weights = (time / chunks / 1e3 for time in pace_ms)
    return {"F": forward, "B": inputs, "W": weights, "BW": inputs + weights}
