"""Requests to a running job by a scheduler or a person: save a checkpoint, or save one and stop.

SIGUSR1 requests a checkpoint; SIGTERM (preemption) and the wall-time limit request a checkpoint and then stop the run.
Signals reach ranks at different times, or one rank only. Ranks agree by an all-reduce of one integer that overlaps
each step.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from enum import IntEnum
from types import FrameType

import torch

from llama_ds.config.schema import CheckpointConfig
from llama_ds.errors import UserError
from llama_ds.job.wall_time import job_start, seconds_left
from llama_ds.parallel import world


class Request(IntEnum):
    """A request; the highest one on any rank wins."""

    NOTHING = 0
    SAVE = 1
    END = 2


def check_time_left(settings: CheckpointConfig) -> None:
    """Check that the job has time for steps.

    Raises:
        UserError: its time limit, less the margin, has passed.
    """
    start = job_start(os.environ)
    left = seconds_left(settings, start)
    if left is not None and left <= 0:
        raise UserError(
            f"checkpoint.wall_time_s = {settings.wall_time_s:g}: counted from {start.what}, "
            f"{time.time() - start.at:.0f} s ago, no time for a step is left before the margin of "
            f"{settings.wall_time_margin_s:g} s; give the job's whole time limit, or start another job"
        )


class Interruptions:
    """Collects the requests to this rank and agrees on them with the other ranks."""

    def __init__(self, settings: CheckpointConfig, device: torch.device) -> None:
        """Handle the signals from now on; a second SIGTERM ends the process at once."""
        left = seconds_left(settings, job_start(os.environ))
        self._deadline = None if left is None else time.monotonic() + left
        self._device = device
        self._own = Request.NOTHING
        self._agreed: Callable[[], int] | None = None  # waits for the all-reduce in flight
        self.reason = "requested on another rank"  # reason for the early end
        self._before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._end),
            signal.SIGUSR1: signal.signal(signal.SIGUSR1, self._save),
        }

    def after_step(self) -> Request:
        """Return the highest request to any rank before the step that has just run, the same on all ranks. Collective.

        The result is one step old. It arrived while the device was busy, so reading it does not block.
        """
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._add(Request.END, "the wall-time limit")
        agreed = Request(self._agreed()) if self._agreed else Request.NOTHING
        self._agreed = world.start_maximum(self._own, self._device)
        if self._own is Request.SAVE:
            self._own = Request.NOTHING
        return agreed

    def close(self) -> None:
        """Restore the signal handlers. Collective."""
        if self._agreed:
            self._agreed()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _add(self, request: Request, reason: str) -> None:
        self._own, self.reason = max(self._own, request), reason

    def _save(self, _number: int, _frame: FrameType | None) -> None:
        self._add(Request.SAVE, "SIGUSR1")

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        self._add(Request.END, "SIGTERM")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
