"""What a scheduler or a person asks of a running job: a checkpoint, or a checkpoint and the end.

SIGUSR1 asks for a checkpoint, SIGTERM (preemption) and the wall-time limit for one and the end. They reach ranks at
different moments, or one rank only; ranks agree on what to do with an integer that travels beside each step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from enum import IntEnum
from types import FrameType

import torch

from llama_ds.config.schema import CheckpointConfig
from llama_ds.parallel import world


class Wish(IntEnum):
    """In the order of precedence."""

    NOTHING = 0
    SAVE = 1
    END = 2


class Interruptions:
    """What is asked of this rank, and what all ranks have agreed on."""

    def __init__(self, settings: CheckpointConfig, device: torch.device) -> None:
        """Handle the signals from now on; a second SIGTERM ends the process at once."""
        self._deadline = (
            time.monotonic() + settings.wall_time_s - settings.wall_time_margin_s if settings.wall_time_s else None
        )
        self._device = device
        self._wish = Wish.NOTHING
        self._agreed: Callable[[], int] | None = None
        self.reason = ""
        self._before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._end),
            signal.SIGUSR1: signal.signal(signal.SIGUSR1, self._save),
        }

    def after_step(self) -> Wish:
        """Return what was asked of any rank before the step that has just run, the same on all ranks. Collective.

        The answer is a step old: it came while the device was busy, and reading it waits for nothing.
        """
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._ask(Wish.END, "the wall-time limit")
        agreed = Wish(self._agreed()) if self._agreed else Wish.NOTHING
        self._agreed = world.start_maximum(self._wish, self._device)
        if self._wish is Wish.SAVE:
            self._wish = Wish.NOTHING
        return agreed

    def close(self) -> None:
        """Give the signals back. Collective."""
        if self._agreed:
            self._agreed()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, wish: Wish, reason: str) -> None:
        self._wish, self.reason = max(self._wish, wish), reason

    def _save(self, _number: int, _frame: FrameType | None) -> None:
        self._ask(Wish.SAVE, "SIGUSR1")

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        self._ask(Wish.END, "SIGTERM")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
