"""When a loss has spiked: above what the steps before it make likely, and not for one step only.

PaLM (arXiv 2204.02311, section 5.1) went back about 100 steps before a spike and skipped 200 to 500 batches of data;
the same data later made no spike. The rule here finds the spike: a loss is high when it exceeds the median of the last
`WINDOW` by `SIGMAS` standard deviations, estimated by 1.4826 times the median absolute deviation, and by `SHARE` of the
median; `PATIENCE` high losses in a row are a spike. High losses do not enter the window, so that it stays what it was
before the spike. Neither does the steep beginning of a run count: a window is not judged by until it is full.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

from llama_ds.job.robust_stats import median_and_deviation

WINDOW = 64
SIGMAS = 8.0
SHARE = 0.05
PATIENCE = 3


@dataclass(frozen=True)
class Spike:
    """A spike: its first step, the loss there, and the loss before it."""

    step: int
    loss: float
    before: float


class SpikeRule:
    """Watches the losses of a run."""

    def __init__(self, window: int = WINDOW) -> None:
        self._usual: deque[float] = deque(maxlen=window)
        self._high: list[tuple[int, float]] = []

    def take(self, step: int, loss: float) -> Spike | None:
        """Take in the loss of a step; return the spike that is now certain, if one is."""
        if not math.isfinite(loss):
            before = statistics.median(self._usual) if self._usual else math.nan
            return Spike(self._high[0][0] if self._high else step, loss, before)
        if not self._is_high(loss):
            self._high.clear()
            self._usual.append(loss)
            return None
        self._high.append((step, loss))
        if len(self._high) < PATIENCE:
            return None
        first, value = self._high[0]
        return Spike(first, value, statistics.median(self._usual))

    def _is_high(self, loss: float) -> bool:
        if len(self._usual) < (self._usual.maxlen or 0):
            return False
        median, deviation = median_and_deviation(self._usual)
        return loss - median > max(SIGMAS * deviation, SHARE * abs(median))
