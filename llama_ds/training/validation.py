"""Validation along training: the loss of each source on the running engine, as evaluating the source alone has it.

Shapes: b rows of a micro-batch, T tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llama_ds.config.schema import RunConfig
from llama_ds.data.sources import Sources
from llama_ds.evaluation.validation import ValidationLoss, rows_by_source
from llama_ds.layout.layout import Layout
from llama_ds.parallel import world
from llama_ds.training.device_batches import Batch, MicroBatch
from llama_ds.training.engines.interface import Engine


class Validation:
    """The validation rows of a run: this rank's micro-batches, and of which source each row is."""

    def __init__(self, run: RunConfig, layout: Layout, sources: Sources, engine: Engine) -> None:
        """Read the rows; on the first rank also the bytes of their text.

        Raises:
            UserError: a source has too few rows, or a shard that holds them is damaged.
        """
        rows = run.evaluation.rows
        self._engine, self._interval = engine, run.evaluation.interval
        self._batches = validation_batches(run, layout, sources, engine)
        shares = sources.validation_shares(rows)
        per_rank = rows // layout.dp
        of_row = np.repeat(np.arange(len(shares)), shares)[per_rank * engine.dp_rank :][:per_rank]
        self._sources = of_row.reshape(-1, layout.micro_batch)  # the source of each row of each micro-batch
        text: dict[str, int] = {}
        if rows and world.is_first():
            text = {part.source: part.text_bytes for part in rows_by_source(sources, rows)}
        self._empty = [
            (source.name, ValidationLoss(share, labels, text.get(source.name, 0), 0.0))
            for source, share, labels in zip(
                sources.config.sources, shares, sources.validation_labels(rows), strict=True
            )
        ]

    def due(self, done: int, last: bool) -> bool:
        """Return whether the rows are evaluated after `done` steps; `last` says that this start of the run ends."""
        return bool(self._batches) and (last or (self._interval > 0 and done % self._interval == 0))

    def losses(self) -> dict[str, ValidationLoss]:
        """Return the loss of each source that has labels, on every rank. Collective.

        Bytes of text are known on the first rank only.
        """
        loss = self._engine.loss
        computed: list[tuple[Tensor, Tensor]] = []
        loss.scores = computed
        try:
            self._engine.evaluate(self._batches, len(self._batches))
        finally:
            loss.scores = None
        sums = np.zeros(len(self._empty))
        if loss.tp.rank == loss.cp.rank == 0:  # the others computed the same
            for of_row, (losses, _) in zip(self._sources, computed, strict=False):  # none before the last stage
                np.add.at(sums, of_row, losses.double().sum(1).cpu().numpy())
        nats = world.total(sums.tolist(), torch.device(world.device()))
        return {
            name: ValidationLoss(one.rows, one.labels, one.text_bytes, own)
            for (name, one), own in zip(self._empty, nats, strict=True)
            if one.labels
        }


def validation_batches(run: RunConfig, layout: Layout, sources: Sources, engine: Engine) -> list[Batch]:
    """Return a rank's validation micro-batches; a middle pipeline stage needs only their number."""
    rows = run.evaluation.rows
    sources.check_validation(rows, layout.dp * layout.micro_batch)
    count = rows // layout.dp // layout.micro_batch
    if not engine.reads_data:
        return [np.empty(0)] * count
    batches = sources.validation_micro_batches(rows, engine.dp_rank, layout.dp, layout.micro_batch)
    labels = sum(sources.validation_labels(rows)) / max(1, count * layout.dp)
    return [MicroBatch(batch, labels) for batch in batches]
