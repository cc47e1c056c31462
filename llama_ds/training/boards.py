"""Boards: programs that plot the metrics of a run beside metrics.jsonl.

To add one, write a class here, open it in `open_boards`, and give it an option in `LoggingConfig` and `NO_BOARDS`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol

from llama_ds.config.schema import LoggingConfig
from llama_ds.errors import UserError


class Board(Protocol):
    """Receives the numbers of every line of metrics.jsonl."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Plot `values`, by name, at `step`."""

    def close(self) -> None:
        """Flush and close."""


def open_boards(settings: LoggingConfig, run_dir: str, first_step: int) -> list[Board]:
    """Return the boards that the run file enables; a resumed run overwrites their points after `first_step`.

    Raises:
        UserError: the package of a board is not installed.
    """
    boards: list[Board] = []
    if settings.tensorboard:
        boards.append(TensorBoard(os.path.join(run_dir, "tensorboard"), first_step))
    return boards


class TensorBoard:
    """Event files for TensorBoard."""

    def __init__(self, folder: str, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "logging.tensorboard = true: the tensorboard package is not installed; "
                "install the [tensorboard] extra or set logging.tensorboard=false"
            ) from None
        self._writer = SummaryWriter(folder, purge_step=first_step + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
