"""Micro-batches on the device: a separate stream copies them while earlier ones are computed.

Shapes: b rows of a micro-batch, T tokens; a micro-batch is an integer array (b, T + 1) whose columns overlap as ids and
labels, (b, T) each. Filler in it is marked (`llama_ds/data/filler.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_ds.model.loss import IGNORED, NextTokenLoss


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The rows of a micro-batch, and by how many labels its loss is divided.

    The loss of a step is the mean over the labels of its global batch. Filler leaves some micro-batches with fewer
    labels than others; each divides its sum by the mean number, so that the mean of their losses is the step's loss.
    """

    rows: np.ndarray | Tensor  # (b, T + 1); a tensor is being copied to a CUDA device
    labels: float  # labels of the global batch, per micro-batch; b * T if none of its rows has filler
    copied: torch.cuda.Event | None = None

    def take(self) -> Tensor:
        """Return the rows for the current stream, which waits for their copy; the host does not wait."""
        assert isinstance(self.rows, Tensor) and self.copied is not None
        stream = torch.cuda.current_stream(self.rows.device)
        stream.wait_event(self.copied)
        self.rows.record_stream(stream)
        return self.rows


Batch = MicroBatch | np.ndarray  # an array: rows without filler, as benchmarks generate them
Batches = Iterable[Batch]


def on_device(batches: Iterator[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """Yield the batches unchanged for a CPU; for CUDA start copies from pinned memory and yield them in flight.

    The read-ahead thread draws from this iterator, so pinning memory and starting a copy cost the step no time.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            rows = torch.from_numpy(batch.rows).pin_memory().to(device, non_blocking=True).long()
            copied = stream.record_event()
        yield replace(batch, rows=rows, copied=copied)  # outside: the thread that takes it computes on its own stream


def ids_and_labels(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Split a micro-batch into ids (b, T) and labels (b, T), which are shifted by one position; filler is `IGNORED`."""
    if isinstance(batch, MicroBatch) and batch.copied is not None:
        rows = batch.take()
    else:
        rows = torch.from_numpy(_rows(batch)).to(device).long()
    labels = rows[:, 1:]
    if not _may_have_filler(batch):
        return rows[:, :-1], labels
    return torch.where(rows < 0, ~rows, rows)[:, :-1], labels.masked_fill(labels < 0, IGNORED)


def training_pair(batch: Batch, device: torch.device, loss: NextTokenLoss) -> tuple[Tensor, Tensor]:
    """Return ids and labels of a micro-batch, and let `loss` divide by its number of labels."""
    ids, labels = ids_and_labels(batch, device)
    if isinstance(batch, MicroBatch):
        loss.labels = batch.labels
    else:
        loss.labels = None if _may_have_filler(batch) else labels.numel()
    return ids, labels


def _may_have_filler(batch: Batch) -> bool:
    """Return whether the micro-batch, or on a CUDA device its global batch, has filler; the host does not wait."""
    if isinstance(batch, MicroBatch) and batch.copied is not None:
        return batch.labels != batch.rows.shape[0] * (batch.rows.shape[1] - 1)
    return bool((_rows(batch) < 0).any())


def _rows(batch: Batch) -> Any:
    return batch.rows if isinstance(batch, MicroBatch) else batch
