"""Micro-batches on the device: a separate stream copies them while earlier ones are computed.

Shapes: b rows of a micro-batch, T tokens; a micro-batch is an integer array (b, T + 1) whose columns overlap as ids and
labels, (b, T) each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class InFlightBatch:
    """A micro-batch (b, T + 1) whose copy to a CUDA device has begun."""

    rows: Tensor
    copied: torch.cuda.Event

    def take(self) -> Tensor:
        """Return the rows for the current stream, which waits for the copy; the host does not wait."""
        stream = torch.cuda.current_stream(self.rows.device)
        stream.wait_event(self.copied)
        self.rows.record_stream(stream)
        return self.rows


Batch = np.ndarray | InFlightBatch
Batches = Iterable[Batch]


def on_device(batches: Iterator[np.ndarray], device: torch.device) -> Iterator[Batch]:
    """Yield the batches unchanged for a CPU; for CUDA start copies from pinned memory and yield them in flight.

    The read-ahead thread draws from this iterator, so pinning memory and starting a copy cost the step no time.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            rows = torch.from_numpy(batch).pin_memory().to(device, non_blocking=True).long()
            yield InFlightBatch(rows, stream.record_event())


def ids_and_labels(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Split a micro-batch into ids (b, T) and labels (b, T), which are shifted by one position."""
    rows = batch.take() if isinstance(batch, InFlightBatch) else torch.from_numpy(batch).to(device).long()
    return rows[:, :-1], rows[:, 1:]
