"""Scores of requests on the engine of a run: a forward-only pass under the run's layout and schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from llama_ds.config.context_parallel import row_multiple
from llama_ds.config.document_marks import DocumentMarks
from llama_ds.config.schema import RunConfig
from llama_ds.evaluation.generation import Decoder
from llama_ds.evaluation.packing import PackedRow
from llama_ds.evaluation.requests import Score
from llama_ds.evaluation.scoring import RowShape, branches_of, rows_of_any_length, stacked, sums, why_unbranched
from llama_ds.layout.layout import Layout
from llama_ds.model.branched_rows import BranchedRows
from llama_ds.parallel import world
from llama_ds.parallel.grid import own_data_rank
from llama_ds.training.device_batches import MicroBatch
from llama_ds.training.engines.generating import EngineDecoder
from llama_ds.training.engines.interface import Engine

T = TypeVar("T")
STOCK = "DeepSpeed's own pipeline keeps the shape of its first messages"


class EngineBackend:
    """Every rank calls it with the same rows, which the ranks share, and every rank gets all scores.

    Plain rows are divided over dp, and each over cp as in training. Branched rows are divided over dp and cp.
    The weights, gradients and optimizer states stay as they are; the engine's next step is a step of training. Products
    are in the dtype of the run, not in float8: scores are those of the weights in any program.
    """

    def __init__(self, engine: Engine, run: RunConfig, layout: Layout, marks: DocumentMarks) -> None:
        self.engine, self.run, self.layout = engine, run, layout
        self._data_rank = own_data_rank(layout)
        self.shape = RowShape(
            run.data.seq_len,
            layout.micro_batch,
            run.data.document_mask,
            marks,
            dp=layout.dp,
            ranks=layout.data_axis,
            any_length=engine.any_row_length and rows_of_any_length(run.model.rope_scaling),
            multiple=row_multiple(run),
            unbranched=STOCK if not engine.any_row_length else why_unbranched(engine.context),
        )

    def scores(self, micro_batches: Sequence[list[PackedRow]], tokens: int, branched: bool) -> dict[int, Score]:
        engine = self.engine
        at, ranks = (self._data_rank, self.layout.data_axis) if branched else (engine.dp_rank, self.layout.dp)
        own = micro_batches[at::ranks]
        computed: list[tuple[Tensor, Tensor]] = []
        engine.loss.scores = computed
        device = torch.device(world.device())

        def branches(i: int) -> BranchedRows:
            return branches_of(own[i], engine.context, device)

        length = None if tokens == self.shape.seq_len else tokens
        try:
            with engine.context.products_of_the_run():
                engine.evaluate(self._batches(own), len(own), length, branches if branched else None)
        finally:
            engine.loss.scores = None
        found: dict[int, Score] = {}
        # Tensor-parallel ranks, and context-parallel ones of plain rows, computed the same.
        if engine.loss.tp.rank == 0 and (branched or engine.loss.cp.rank == 0):
            for rows, (losses, greedy) in zip(own, computed, strict=False):  # none before the last stage
                found |= sums(rows, losses, greedy)
        return {number: score for part in world.gather(found) for number, score in part.items()}

    def decoder(self) -> Decoder:
        return EngineDecoder(self.engine, self.run, self.layout)

    def once(self, work: Callable[[], T]) -> T:
        return world.gather(work() if world.is_first() else None)[0]  # type: ignore[return-value]

    def _batches(self, own: Sequence[list[PackedRow]]) -> Iterator[MicroBatch | np.ndarray]:
        if not self.engine.reads_data:
            return iter([np.empty(0)] * len(own))
        return (MicroBatch(stacked(rows), 1.0) for rows in own)
