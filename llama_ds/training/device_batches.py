"""Micro-batches on their way to the device, on a stream of their own, while earlier ones are computed with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Arriving:
    """A micro-batch (b, T + 1) whose copy to a CUDA device was begun."""

    rows: Tensor
    copied: torch.cuda.Event

    def take(self) -> Tensor:
        """Return it for the current stream, which waits for the copy; the host does not."""
        stream = torch.cuda.current_stream(self.rows.device)
        stream.wait_event(self.copied)
        self.rows.record_stream(stream)
        return self.rows


def on_device(batches: Iterator[np.ndarray], device: torch.device) -> Iterator[np.ndarray | Arriving]:
    """Yield the batches as they are for a CPU, and for CUDA as copies that were begun from pinned memory.

    To be drawn from by the thread that reads ahead: pinning and starting a copy then cost the step nothing.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            rows = torch.from_numpy(batch).pin_memory().to(device, non_blocking=True).long()
            yield Arriving(rows, stream.record_event())
