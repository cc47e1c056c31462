"""Ranks whose own gradient norm is far from that of their data-parallel peers: pure arithmetic on the norms of steps.

Let x be the logarithm of a rank's norm, minus the median of its group's. x differs between ranks, because their rows
do; its median over the last WINDOW steps is the rank's usual one, and the robust standard deviation around it, over
all steps and ranks of the group, the spread. A rank is

- reported if x is more than REPORTED_SPREADS and a factor REPORTED_FACTOR from the usual one;
- refused, before the step is taken, if it is more than REFUSED_SPREADS and a factor REFUSED_FACTOR away, or if its norm
  is not finite and that of another replica is. If no replica has a finite norm, the run diverges.

The factor of refusal is far above what rows do: hardware that flips a high bit of an exponent changes a number by 2^16
and more. Of two replicas the one whose own norm has changed more is the outlier. One replica has no peers.

Shapes: R ranks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_ds.job.robust_stats import NORMAL

WINDOW, SHORTEST = 64, 16  # steps: at most, and at least before spreads count
REPORTED_SPREADS, REPORTED_FACTOR = 10.0, 4.0
REFUSED_SPREADS, REFUSED_FACTOR = 20.0, 256.0
LEAST_SPREAD = 0.01
_TINY = 1e-30  # instead of a norm of 0


@dataclass(frozen=True)
class Outlier:
    """A rank whose gradient norm is far from its peers'."""

    rank: int
    norm: float
    median: float  # median of its peers' norms
    refused: bool


class GradientOutliers:
    """Judges the norms of step after step."""

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        """`groups` are the ranks whose norms are comparable."""
        self._groups = [np.array(group) for group in groups if len(group) > 1]
        self._past: deque[np.ndarray] = deque(maxlen=WINDOW)  # logarithms (R,), of steps without outliers

    def judge(self, norms: np.ndarray) -> list[Outlier]:
        """Return the outliers of a step, worst first, from the norms of all ranks (R,)."""
        if not np.isfinite(norms).all():
            return self._not_finite(norms)
        logs = np.log(np.maximum(norms, _TINY))
        past = np.array(self._past)
        found = [outlier for group in self._groups for outlier in self._outliers(group, norms, logs, past)]
        if not found:
            self._past.append(logs)
        return sorted(found, key=lambda one: -abs(math.log(max(one.norm, _TINY) / max(one.median, _TINY))))

    def _not_finite(self, norms: np.ndarray) -> list[Outlier]:
        found = []
        for group in self._groups:
            finite = np.isfinite(norms[group])
            if finite.any():
                median = float(np.median(norms[group][finite]))
                found += [Outlier(int(rank), float(norms[rank]), median, True) for rank in group[~finite]]
        return found

    def _outliers(self, group: np.ndarray, norms: np.ndarray, logs: np.ndarray, past: np.ndarray) -> list[Outlier]:
        now = logs[group]
        apart = now - np.median(now)
        usual, spread = np.zeros(len(group)), LEAST_SPREAD
        if len(past) >= SHORTEST:
            before = past[:, group] - np.median(past[:, group], 1, keepdims=True)
            usual = np.median(before, 0)
            spread = max(spread, NORMAL * float(np.median(np.abs(before - usual))))
        apart = apart - usual
        if len(group) == 2:  # both are as far from their median
            own = np.abs(now - np.median(past[:, group], 0)) if len(past) else np.zeros(2)
            apart = np.where(own >= own.max(), 2 * apart, 0.0)
        found = []
        for rank, far in zip(group.tolist(), np.abs(apart).tolist(), strict=True):
            refused = far > max(math.log(REFUSED_FACTOR), REFUSED_SPREADS * spread)
            known = len(past) >= SHORTEST  # before that, what is usual is not known
            if refused or (known and far > max(math.log(REPORTED_FACTOR), REPORTED_SPREADS * spread)):
                others = norms[group[group != rank]]
                found.append(Outlier(rank, float(norms[rank]), float(np.median(others)), refused))
        return found
