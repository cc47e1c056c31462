"""Micro-batches on the device: a separate stream copies them while earlier ones are computed.

Shapes: b rows of a micro-batch, T tokens; a micro-batch is an integer array (b, T + 1) whose columns overlap as ids and
labels, (b, T) each. Filler in it is marked (`llama_ds/data/filler.py`). A context-parallel rank gets its share of the
columns (`row_share.py`), with T / cp ids and labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from llama_ds.data.filler import count_labels
from llama_ds.model.decoder import Ids, LayerContext
from llama_ds.model.loss import IGNORED, NextTokenLoss
from llama_ds.training.row_share import RowShare


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The rows of a micro-batch, and by how many labels its loss is divided.

    The loss of a step is the mean over the labels of its global batch. Filler leaves some micro-batches with fewer
    labels than others; each divides its sum by the mean number, so that the mean of their losses is the step's loss.
    """

    rows: np.ndarray | Tensor  # (b, T + 1), or a rank's share; a tensor is being copied to a CUDA device
    labels: float  # labels of the global batch, per micro-batch; b * T if none of its rows has filler
    copied: torch.cuda.Event | None = None
    share: RowShare | None = None  # set if `rows` are a rank's share of whole rows

    def shared(self, share: RowShare | None) -> MicroBatch:
        """Return the micro-batch with a rank's share of its whole rows; unchanged with None."""
        if share is None:
            return self
        assert isinstance(self.rows, np.ndarray) and self.share is None
        return replace(self, rows=share.of(self.rows), share=share)

    def on(self, device: torch.device) -> Tensor:
        """Return the rows on a device.

        If they are being copied, the current stream waits for their copy; the host does not wait.
        """
        if isinstance(self.rows, np.ndarray):
            return torch.from_numpy(self.rows).to(device)
        assert self.copied is not None
        stream = torch.cuda.current_stream(self.rows.device)
        stream.wait_event(self.copied)
        self.rows.record_stream(stream)
        return self.rows


Batch = MicroBatch | np.ndarray  # an array: rows without filler, as benchmarks generate them
Batches = Iterable[Batch]


def on_device(
    batches: Iterator[MicroBatch], device: torch.device, share: RowShare | None = None
) -> Iterator[MicroBatch]:
    """Yield this rank's `share` of the batches; for CUDA start copies from pinned memory and yield them in flight.

    The read-ahead thread draws from this iterator, so pinning memory and starting a copy cost the step no time.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for whole in batches:
        batch = whole.shared(share)
        if stream is not None:
            with torch.cuda.stream(stream):
                rows = torch.from_numpy(batch.rows).pin_memory().to(device, non_blocking=True)
                batch = replace(batch, rows=rows, copied=stream.record_event())
        yield batch  # outside: the thread that takes it computes on its own stream


def ids_and_labels(batch: MicroBatch | np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Split whole rows into ids (b, T) and labels (b, T), which are shifted by one position; filler is `IGNORED`."""
    ids, labels, _ = _split(_micro_batch(batch), device)
    return ids, labels


def training_pair(batch: Batch, device: torch.device, loss: NextTokenLoss, context: LayerContext) -> tuple[Ids, Tensor]:
    """Return the ids and labels of a rank's tokens of a micro-batch, and let `loss` divide by its number of labels.

    Rows that were not shared before, as those of evaluation, are shared as `context` says.
    """
    own = _micro_batch(batch)
    if own.share is None:
        own = own.shared(row_share(context, own.rows.shape[1] - 1))
    ids, labels, starts = _split(own, device)
    loss.labels = own.labels
    return (ids if starts is None else (ids, starts)), labels


def row_share(context: LayerContext, tokens: int) -> RowShare | None:
    """Return this rank's share of rows of `tokens`; None: it has whole rows."""
    if context.cp.size == 1:
        return None
    return RowShare(tokens, context.cp.rank, context.cp.sizes, context.marks if context.document_mask else None)


def _micro_batch(batch: Batch) -> MicroBatch:
    return batch if isinstance(batch, MicroBatch) else MicroBatch(batch, count_labels(batch))


def _split(batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ids, labels and, for a share with document masks, document starts."""
    rows, starts = batch.on(device), None
    if batch.share is None:
        rows = rows.long()
        ids, labels = rows[:, :-1], rows[:, 1:]
    else:
        ids, labels, starts = batch.share.split(rows)
    if _may_have_filler(batch):
        ids, labels = torch.where(ids < 0, ~ids, ids), labels.masked_fill(labels < 0, IGNORED)
    return ids, labels, starts


def _may_have_filler(batch: MicroBatch) -> bool:
    """Return whether the micro-batch, or on a CUDA device its global batch, has filler; the host does not wait."""
    rows, tokens = batch.rows.shape
    if isinstance(batch.rows, np.ndarray) and batch.share is None:
        return bool((batch.rows < 0).any())
    return batch.labels != rows * (batch.share.tokens if batch.share else tokens - 1)
