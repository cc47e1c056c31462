"""Records in the event log where an attempt's time goes: when training begins, then how far it is once a minute.

`llama_ds.experiments.goodput` computes the effective training time from these events.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from llama_ds.job.wire import Phase
from llama_ds.launch.supervise.events import Events

INTERVAL_S = 60.0  # bounds the size of the log: 1,440 lines a day


class ProgressLog:
    """Writes `progress` events: completed steps, and the seconds of other phases since the event before.

    The first one of an attempt has the step at which training begins, the second one follows the first step. The time
    of the second one is late by one heartbeat at most.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._seconds: defaultdict[str, float] = defaultdict(float)  # seconds of each phase since the last event
        self._start: int | None = None  # the step at which training began
        self._written_step = 0
        self._written_at = 0.0

    @property
    def trains(self) -> bool:
        """Whether a rank has begun to train in the attempt."""
        return self._start is not None

    @property
    def has_begun(self) -> bool:
        """Whether the first step of the attempt has been completed."""
        return self._start is not None and self._written_step > self._start

    def take(self, report: Mapping[str, Any]) -> None:
        """Record a rank's report that it has left a phase."""
        if self._start is not None and report["phase"] != Phase.TRAINING:
            self._seconds[Phase(report["phase"]).name.lower()] += float(report["seconds"])
        elif self._start is None and report.get("to") == Phase.TRAINING:
            self._start = int(report["step"])
            self._write(self._start)

    def update(self, step: int) -> None:
        """Write an event after the first step, and if the last one is old."""
        if self._start is None or step <= self._written_step:
            return
        if self._written_step == self._start or time.monotonic() - self._written_at >= INTERVAL_S:
            self._write(step)

    def close(self, step: int) -> None:
        """Write the last event of the attempt."""
        if self._start is not None:
            self._write(max(step, self._written_step))

    def _write(self, step: int) -> None:
        seconds = {name: round(value, 3) for name, value in self._seconds.items()}
        self._events.add("progress", step=step, seconds=seconds)
        self._seconds.clear()
        self._written_step, self._written_at = step, time.monotonic()
