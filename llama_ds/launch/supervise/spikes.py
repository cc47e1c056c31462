"""Detection of loss spikes: losses far above those of the previous steps, for several steps in a row.

PaLM (arXiv 2204.02311, section 5.1) restarted about 100 steps before a spike and skipped 200 to 500 batches of data;
the same data caused no spike later. A loss is high if it exceeds the median of the last `WINDOW` losses by `SIGMAS`
standard deviations (estimated as 1.4826 times the median absolute deviation) and by the fraction `SHARE` of the median.
`MIN_HIGH` high losses in a row are a spike. High losses do not enter the window, so that it describes the steps before
the spike. No loss is high until the window is full, which excludes the steep beginning of a run.
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
MIN_HIGH = 3


@dataclass(frozen=True)
class Spike:
    """A spike: its first step, the loss at that step, and the median loss before it."""

    step: int
    loss: float
    before: float


class SpikeRule:
    """Watches the losses of a run."""

    def __init__(self, window: int = WINDOW) -> None:
        self._usual: deque[float] = deque(maxlen=window)
        self._high: list[tuple[int, float]] = []

    def take(self, step: int, loss: float) -> Spike | None:
        """Record the loss of a step; return a spike if this step confirms one."""
        if not math.isfinite(loss):
            before = statistics.median(self._usual) if self._usual else math.nan
            return Spike(self._high[0][0] if self._high else step, loss, before)
        if not self._is_high(loss):
            self._high.clear()
            self._usual.append(loss)
            return None
        self._high.append((step, loss))
        if len(self._high) < MIN_HIGH:
            return None
        first, value = self._high[0]
        return Spike(first, value, statistics.median(self._usual))

    def _is_high(self, loss: float) -> bool:
        if len(self._usual) < (self._usual.maxlen or 0):
            return False
        median, deviation = median_and_deviation(self._usual)
        return loss - median > max(SIGMAS * deviation, SHARE * abs(median))
