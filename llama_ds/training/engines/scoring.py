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
from llama_ds.errors import UserError
from llama_ds.evaluation.generation import Decoder
from llama_ds.evaluation.packing import PackedRow
from llama_ds.evaluation.requests import Score
from llama_ds.evaluation.scoring import RowShape, branches_of, hides_prefix, rows_of_any_length, stacked, sums
from llama_ds.layout.layout import Layout
from llama_ds.model.branched_rows import BranchedRows
from llama_ds.parallel import world
from llama_ds.training.device_batches import MicroBatch
from llama_ds.training.engines.generating import EngineDecoder
from llama_ds.training.engines.interface import Engine

T = TypeVar("T")


class EngineBackend:
    """Every rank calls it with the same rows; data-parallel ranks share them, and every rank gets all scores.

    The weights, gradients and optimizer states stay as they are; the engine's next step is a step of training.
    """

    def __init__(self, engine: Engine, run: RunConfig, layout: Layout, marks: DocumentMarks) -> None:
        self.engine, self.run, self.layout = engine, run, layout
        any_length = engine.any_row_length and rows_of_any_length(run.model.rope_scaling)
        self.shape = RowShape(
            run.data.seq_len,
            layout.micro_batch,
            layout.dp,
            run.data.document_mask,
            marks,
            any_length=any_length,
            multiple=row_multiple(run),
            branches=any_length and layout.cp == 1 and not hides_prefix(run.data.document_mask, marks),
        )

    def scores(self, micro_batches: Sequence[list[PackedRow]], tokens: int) -> dict[int, Score]:
        engine = self.engine
        own = micro_batches[engine.dp_rank :: self.shape.dp]
        computed: list[tuple[Tensor, Tensor]] = []
        engine.loss.scores = computed
        device = torch.device(world.device())

        def branches(i: int) -> BranchedRows:
            return branches_of(own[i], engine.context, device)

        length = None if tokens == self.shape.seq_len else tokens
        try:
            engine.evaluate(self._batches(own), len(own), length, branches if self.shape.branches else None)
        finally:
            engine.loss.scores = None
        found: dict[int, Score] = {}
        if engine.loss.tp.rank == engine.loss.cp.rank == 0:  # the others computed the same
            for rows, (losses, greedy) in zip(own, computed, strict=False):  # none before the last stage
                found |= sums(rows, losses, greedy)
        return {number: score for part in world.gather(found) for number, score in part.items()}

    def decoder(self) -> Decoder:
        if self.layout.cp > 1:
            raise UserError(
                f"parallel.cp = {self.layout.cp}: ranks that share rows cannot generate text; evaluate the checkpoints "
                "by tools/evaluate.py"
            )
        return EngineDecoder(self.engine, self.run, self.layout)

    def once(self, work: Callable[[], T]) -> T:
        return world.gather(work() if world.is_first() else None)[0]  # type: ignore[return-value]

    def _batches(self, own: Sequence[list[PackedRow]]) -> Iterator[MicroBatch | np.ndarray]:
        if not self.engine.reads_data:
            return iter([np.empty(0)] * len(own))
        return (MicroBatch(stacked(rows), 1.0) for rows in own)
