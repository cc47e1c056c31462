"""Requests to a running job by a scheduler or a person: save a checkpoint, or save one and stop.

SIGUSR1 requests a checkpoint; SIGTERM (preemption), SIGINT and the wall-time limit request a checkpoint and then stop
the run. Signals reach ranks at different times, or one rank only. Ranks agree by an all-reduce of one integer that
overlaps each step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from llama_ds.config.schema import CheckpointConfig
from llama_ds.errors import UserError
from llama_ds.job.requests import Request, Requests
from llama_ds.job.wall_time import job_start, seconds_left
from llama_ds.parallel import world

ON_ANOTHER_RANK = "requested on another rank"


class EndedEarly(Exception):
    """The ranks have agreed to end before the first step, because one of them was asked to."""

    def __init__(self, request: Request, reason: str) -> None:
        super().__init__(reason)
        self.request = request


def end_if_asked(requests: Requests, device: torch.device) -> None:
    """End the run before its first step if a rank was asked to. Collective.

    Raises:
        EndedEarly: on all ranks alike.
    """
    agreed = Request(world.start_maximum(requests.highest, device)())
    if agreed >= Request.END:
        raise EndedEarly(agreed, requests.reason or ON_ANOTHER_RANK)


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
    """Agrees with the other ranks on the requests to any of them."""

    def __init__(self, settings: CheckpointConfig, device: torch.device, requests: Requests | None = None) -> None:
        """From now on there is something to save. Without `requests`, handle signals until `close`."""
        left = seconds_left(settings, job_start(os.environ))
        self._deadline = None if left is None else time.monotonic() + left
        self._device = device
        self._agreed: Callable[[], int] | None = None  # waits for the all-reduce in flight
        self._requests, self._listens = requests or Requests(), requests is None
        if self._listens:
            self._requests.listen()
        self._requests.keep()

    @property
    def reason(self) -> str:
        """The reason for the early end."""
        return self._requests.reason or ON_ANOTHER_RANK

    def after_step(self) -> Request:
        """Return the highest request to any rank before the step that has just run, the same on all ranks. Collective.

        The result is one step old. It arrived while the device was busy, so reading it does not block.
        """
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._requests.ask(Request.END, "the wall-time limit")
        agreed = Request(self._agreed()) if self._agreed else Request.NOTHING
        self._agreed = world.start_maximum(self._requests.take(), self._device)
        return agreed

    def close(self) -> None:
        """Wait for the all-reduce in flight; end the handling of signals that began here. Collective."""
        if self._agreed:
            self._agreed()
        if self._listens:
            self._requests.close()
