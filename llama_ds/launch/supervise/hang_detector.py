"""Detection of a hang: a bound on the time without progress, learned from the durations of steps and phases."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from llama_ds.job.wire import Phase
from llama_ds.launch.supervise.server import Member

SAMPLES = 32
MIN_SAMPLES = 3  # steps needed before their median is used


@dataclass(frozen=True)
class HangLimits:
    """Bounds on the time without progress."""

    factor: float = 10.0  # multiple of the median step, or of the longest phase
    min_s: float = 60.0  # lower limit of that bound, for short steps
    start_s: float = 1800.0  # bound for a phase of unknown duration: starting, loading, the first save


class HangDetector:
    """Follows the progress of all ranks."""

    def __init__(self, limits: HangLimits) -> None:
        self._limits = limits
        self._steps: deque[float] = deque(maxlen=SAMPLES)  # durations of the last steps in seconds
        self._longest: dict[int, float] = {}  # longest completed duration of every other phase
        self._seen: tuple[int, int, frozenset[Phase]] = (0, 0, frozenset())
        self._since = self._step_since = time.monotonic()

    @property
    def step(self) -> int:
        """The maximum number of completed steps of any rank."""
        return self._seen[1]

    def update(self, members: Iterable[Member]) -> bool:
        """Record the progress of all ranks; return whether they have been stalled for too long."""
        now = time.monotonic()
        positions = {member.beat[:2] for member in members}  # a small set: ranks are at most a few steps apart
        steps = [step for step, _ in positions]
        seen = (min(steps, default=0), max(steps, default=0), frozenset(phase for _, phase in positions))
        if seen != self._seen:
            self._learn_steps(seen, now)
            self._seen, self._since = seen, now
        return now - self._since > self.bound()

    def learn(self, phase: int, seconds: float) -> None:
        """Record the duration of a completed phase."""
        self._longest[phase] = max(self._longest.get(phase, 0.0), seconds)

    def bound(self) -> float:
        """Return the allowed time without progress in the current phases, in seconds."""
        return max((self._bound_of(phase) for phase in self._seen[2]), default=self._limits.start_s)

    @property
    def stalled_s(self) -> float:
        """The time since the last progress."""
        return time.monotonic() - self._since

    @property
    def step_s(self) -> float | None:
        """The median duration of a step, None before it is known."""
        return statistics.median(self._steps) if len(self._steps) >= MIN_SAMPLES else None

    def _bound_of(self, phase: Phase) -> float:
        usual = self.step_s if phase is Phase.TRAINING else self._longest.get(phase)
        if usual is None or phase in (Phase.STARTING, Phase.LOADING):
            return self._limits.start_s
        return max(self._limits.min_s, self._limits.factor * usual)

    def _learn_steps(self, seen: tuple[int, int, frozenset[Phase]], now: float) -> None:
        more = seen[1] - self._seen[1]
        if more > 0:
            # The first step after another phase also includes that phase's time.
            if self._seen[2] == {Phase.TRAINING} and self._seen[1]:
                self._steps.append((now - self._step_since) / more)
            self._step_since = now
