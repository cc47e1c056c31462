"""What a rank did in one step and when: computations, messages, waits; written for `llama_ds.perf.timeline`.

Times are microseconds of the host's monotonic clock, which all processes of a machine share. On CUDA they are those at
which the device reached the event, put onto the same clock.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import torch

from llama_ds.parallel.step_times import StepTimes


class Trace:
    """Records while `recording`; otherwise each call is a comparison or two, and waits are added up (`times`)."""

    def __init__(self, device: torch.device) -> None:
        self.recording = False
        self.doing: object = ""  # what this rank is doing now, for who asks why nothing moves
        self.waits = False  # whether that is to wait for another rank
        self._cuda = device.type == "cuda"
        self.times = StepTimes(self._cuda)
        self._events: list[tuple[str, Any, Any, int, int, int]] = []
        self._origin: tuple[Any, float] | None = None

    def start(self) -> None:
        """Record from now on."""
        self.recording = True
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

    def watch(self, what: str, work: Any, size: int) -> None:
        """Note a collective from now to its completion, which a callback tells; on CUDA only that it was issued."""
        if not self.recording:
            return
        begin = self.now()
        if self._cuda:
            self._events.append((what, begin, begin, -1, -1, size))
        else:
            events = self._events
            work.get_future().add_done_callback(
                lambda _: events.append((what, begin, time.monotonic_ns() / 1e3, -1, -1, size))
            )

    def write(self, folder: str, rank: int, **about: Any) -> None:
        """Stop recording and write folder/rank<N>.json."""
        self.recording = False
        events = [
            {
                "what": what,
                "begin": self._microseconds(begin),
                "end": self._microseconds(end),
                "stage": stage,
                "micro_batch": micro_batch,
                "bytes": size,
            }
            for what, begin, end, stage, micro_batch, size in self._events
        ]
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, f"rank{rank:05d}.json"), "w") as file:
            json.dump({"rank": rank, **about, "events": events}, file)

    def _microseconds(self, mark: Any) -> float:
        if not self._cuda:
            return mark
        assert self._origin is not None
        origin, host = self._origin
        mark.synchronize()
        return host + origin.elapsed_time(mark) * 1e3
