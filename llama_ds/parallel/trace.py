"""Records a rank's events in selected steps for `llama_ds.perf.trace`: computations, messages, collectives, waits.

Times are microseconds of the host's monotonic clock, which all processes of a machine share. On CUDA they are the times
at which the device reached the event, converted to that clock. Event names are defined in `perf/trace/kinds.py`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from llama_ds.atomic_files import write_atomically
from llama_ds.job.trace_format import FORMAT, RANK_FILE
from llama_ds.parallel.step_times import StepTimes

_NOTHING = nullcontext()


class Trace:
    """Records while `recording`; otherwise calls cost one or two comparisons, and waits are summed in `times`."""

    def __init__(self, device: torch.device) -> None:
        self.recording = False
        self.steps_left = 0  # number of steps still to record
        self.doing: object = ""  # current activity of this rank, for reports on a hang
        self.waits = False  # whether the activity is a wait for another rank
        self._cuda = device.type == "cuda"
        self.times = StepTimes(self._cuda)
        self._events: list[tuple[str, Any, Any, int, int, int]] = []
        self._origin: tuple[Any, float] | None = None

    def start(self, steps: int = 1) -> None:
        """Record the next `steps` steps."""
        self.recording, self.steps_left = True, steps
        self._events.clear()
        if self._cuda:
            torch.cuda.synchronize()
            self._origin = (self.now(), time.monotonic_ns() / 1e3)

    def doing_now(self) -> tuple[str, bool]:
        """Return this rank's current activity as text, and whether it waits for another rank."""
        return str(self.doing), self.waits

    def now(self) -> Any:
        """Return a timestamp of this moment, None if not recording."""
        if not self.recording:
            return None
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.monotonic_ns() / 1e3

    def mark(self) -> Any:
        """Return a timestamp for an event that is also summed in `times`."""
        return self.times.now() if self.times.counting else self.now()

    def add(self, what: str, begin: Any = None, stage: int = -1, micro_batch: int = -1, size: int = 0) -> None:
        """Record the event `what` from the timestamp `begin` until now; without `begin`, as happening now."""
        if self.recording:
            end = self.now()
            self._events.append((what, end if begin is None else begin, end, stage, micro_batch, size))
        elif begin is not None:
            self.times.add(what, begin)

    def end_step(self, begin: Any) -> bool:
        """Record a step from the timestamp `begin` until now; return whether it is the last recorded one."""
        if not self.recording:
            return False
        self.add("step", begin)
        self.steps_left -= 1
        return self.steps_left == 0

    def around(self, what: str) -> AbstractContextManager[None]:
        """Return a context that is recorded as the event `what`."""
        return self._span(what) if self.recording else _NOTHING

    @contextmanager
    def _span(self, what: str) -> Iterator[None]:
        begin = self.now()
        yield
        self.add(what, begin)

    def watch(self, what: str, work: Any, size: int) -> Any:
        """Record a collective from now to its completion by a callback, or else return a timestamp for `done`.

        On CUDA, and for gloo's reduce-scatter, there is no callback, and `done` is called after the wait.
        """
        if not self.recording:
            return None
        begin = self.now()
        if self._cuda:
            return begin
        try:
            future = work.get_future()
        except RuntimeError:
            return begin
        events = self._events
        future.add_done_callback(lambda _: events.append((what, begin, time.monotonic_ns() / 1e3, -1, -1, size)))
        return None

    def done(self, what: str, watched: Any, size: int) -> None:
        """Record the collective for which `watch` returned a timestamp as complete."""
        if watched is not None and self.recording:
            self.add(what, watched, size=size)

    def stop(self) -> None:
        """Stop recording."""
        self.recording, self.steps_left = False, 0

    def write(self, folder: str, rank: int, **about: Any) -> None:
        """Stop recording and write the rank's file into `folder`; `about` is metadata for its readers.

        Raises:
            OSError: it cannot be written.
        """
        self.stop()
        rows = [
            (what, round(self._microseconds(begin), 3), round(self._microseconds(end), 3), *details)
            for what, begin, end, *details in list(self._events)
        ]
        self._events.clear()
        os.makedirs(folder, exist_ok=True)
        text = json.dumps({"format": FORMAT, "rank": rank, **about, "events": rows}, separators=(",", ":"))
        write_atomically(os.path.join(folder, RANK_FILE.format(rank)), text)

    def _microseconds(self, mark: Any) -> float:
        if not self._cuda:
            return mark
        assert self._origin is not None
        origin, host = self._origin
        mark.synchronize()
        return host + origin.elapsed_time(mark) * 1e3
