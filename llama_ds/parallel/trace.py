"""What a rank did in some steps and when: computations, messages, collectives, waits; for `llama_ds.perf.trace`.

Times are microseconds of the host's monotonic clock, which all processes of a machine share. On CUDA they are those at
which the device reached the event, put onto the same clock. The names of what is recorded are `perf/trace/kinds.py`'s.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from llama_ds.job.trace_format import FORMAT, RANK_FILE
from llama_ds.parallel.step_times import StepTimes

_NOTHING = nullcontext()


class Trace:
    """Records while `recording`; otherwise each call is a comparison or two, and waits are added up (`times`)."""

    def __init__(self, device: torch.device) -> None:
        self.recording = False
        self.steps_left = 0  # to record
        self.doing: object = ""  # what this rank is doing now, for who asks why nothing moves
        self.waits = False  # whether that is to wait for another rank
        self._cuda = device.type == "cuda"
        self.times = StepTimes(self._cuda)
        self._events: list[tuple[str, Any, Any, int, int, int]] = []
        self._origin: tuple[Any, float] | None = None

    def start(self, steps: int = 1) -> None:
        """Record from now on, for so many steps."""
        self.recording, self.steps_left = True, steps
        self._events.clear()
        if self._cuda:
            torch.cuda.synchronize()
            self._origin = (self.now(), time.monotonic_ns() / 1e3)

    def doing_now(self) -> tuple[str, bool]:
        """Return in words what this rank is doing, and whether it waits for another."""
        return str(self.doing), self.waits

    def now(self) -> Any:
        """Return a mark of this moment."""
        if not self.recording:
            return None
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.monotonic_ns() / 1e3

    def mark(self) -> Any:
        """Return a mark of this moment for one of the things that are added up as well as recorded."""
        return self.times.now() if self.times.counting else self.now()

    def add(self, what: str, begin: Any = None, stage: int = -1, micro_batch: int = -1, size: int = 0) -> None:
        """Note that `what` lasted from the mark `begin` until now; without it, that it happened now."""
        if self.recording:
            end = self.now()
            self._events.append((what, end if begin is None else begin, end, stage, micro_batch, size))
        elif begin is not None:
            self.times.add(what, begin)

    def end_step(self, begin: Any) -> bool:
        """Note a step from the mark `begin` until now; tell whether it is the last to be recorded."""
        if not self.recording:
            return False
        self.add("step", begin)
        self.steps_left -= 1
        return self.steps_left == 0

    def around(self, what: str) -> AbstractContextManager[None]:
        """Return a context that notes how long it lasted as `what`."""
        return self._span(what) if self.recording else _NOTHING

    @contextmanager
    def _span(self, what: str) -> Iterator[None]:
        begin = self.now()
        yield
        self.add(what, begin)

    def watch(self, what: str, work: Any, size: int) -> Any:
        """Note a collective from now to its completion, which a callback tells, or else return the mark of now.

        That is for `done`, once it was waited for: on CUDA, and for gloo's reduce-scatter, no callback tells.
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
        """Note that what `watch` gave a mark for is completed, by now at the latest."""
        if watched is not None and self.recording:
            self.add(what, watched, size=size)

    def stop(self) -> None:
        """Record no more."""
        self.recording, self.steps_left = False, 0

    def write(self, folder: str, rank: int, **about: Any) -> None:
        """Stop recording and write the rank's file into `folder`; `about` is what its readers have to know.

        Raises:
            OSError: it cannot be written.
        """
        self.stop()
        rows = [
            (what, round(self._microseconds(begin), 3), round(self._microseconds(end), 3), *place)
            for what, begin, end, *place in list(self._events)
        ]
        self._events.clear()
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, RANK_FILE.format(rank)), "w") as file:
            json.dump({"format": FORMAT, "rank": rank, **about, "events": rows}, file, separators=(",", ":"))

    def _microseconds(self, mark: Any) -> float:
        if not self._cuda:
            return mark
        assert self._origin is not None
        origin, host = self._origin
        mark.synchronize()
        return host + origin.elapsed_time(mark) * 1e3
