"""Whether a job moves: how long it may stand still, learnt from how long its steps take."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from llama_ds.job.wire import Phase
from llama_ds.launch.supervise.server import Member

SAMPLES = 32
FEWEST = 3  # steps seen before anything is concluded from them


@dataclass(frozen=True)
class HangLimits:
    """How long is too long."""

    factor: float = 10.0  # times the median step
    least_s: float = 60.0  # however short the steps are
    start_s: float = 1800.0  # for a phase whose length is not known yet: starting, loading, the first save


class HangDetector:
    """Follows the steps of all ranks."""

    def __init__(self, patience: HangLimits) -> None:
        self._patience = patience
        self._steps: deque[float] = deque(maxlen=SAMPLES)  # seconds of a step
        self._longest: dict[int, float] = {}  # of the other phases, as far as they ended
        self._seen: tuple[int, int, frozenset[Phase]] = (0, 0, frozenset())
        self._since = self._step_since = time.monotonic()

    @property
    def step(self) -> int:
        """The most steps that any rank has done."""
        return self._seen[1]

    def look(self, members: Iterable[Member]) -> bool:
        """Take in where all ranks are; tell whether they have stood still for too long."""
        now = time.monotonic()
        places = {member.beat[:2] for member in members}  # few: ranks of a job are close together
        steps = [step for step, _ in places]
        seen = (min(steps, default=0), max(steps, default=0), frozenset(phase for _, phase in places))
        if seen != self._seen:
            self._learn_steps(seen, now)
            self._seen, self._since = seen, now
        return now - self._since > self.bound()

    def learn(self, phase: int, seconds: float) -> None:
        """Take in how long a phase took that has ended."""
        self._longest[phase] = max(self._longest.get(phase, 0.0), seconds)

    def bound(self) -> float:
        """Return how long the job may stand still where it is now, in seconds."""
        return max((self._bound_of(phase) for phase in self._seen[2]), default=self._patience.start_s)

    @property
    def still_s(self) -> float:
        """How long it has stood still."""
        return time.monotonic() - self._since

    @property
    def step_s(self) -> float | None:
        """The median time of a step, None before it is known."""
        return statistics.median(self._steps) if len(self._steps) >= FEWEST else None

    def _bound_of(self, phase: Phase) -> float:
        usual = self.step_s if phase is Phase.TRAINING else self._longest.get(phase)
        if usual is None or phase in (Phase.STARTING, Phase.LOADING):
            return self._patience.start_s
        return max(self._patience.least_s, self._patience.factor * usual)

    def _learn_steps(self, seen: tuple[int, int, frozenset[Phase]], now: float) -> None:
        more = seen[1] - self._seen[1]
        if more > 0:
            # The first step after another phase holds that phase's time too.
            if self._seen[2] == {Phase.TRAINING} and self._seen[1]:
                self._steps.append((now - self._step_since) / more)
            self._step_since = now
