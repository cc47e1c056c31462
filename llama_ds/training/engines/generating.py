"""Generation of text on the engine of a run, under the run's layout and schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama_ds.config.schema import RunConfig
from llama_ds.evaluation.generation import position_limit
from llama_ds.layout.layout import Layout
from llama_ds.model.decoder import DecoderLayer
from llama_ds.model.next_token import DecodePass
from llama_ds.parallel import world
from llama_ds.parallel.grid import own_data_rank
from llama_ds.training.engines.interface import Engine

ROWS = 16  # prompts of a batch at least: a step of generation reads all weights for one token of each row


class EngineDecoder:
    """Continues texts on an engine: the prompts are divided over dp and cp, and every rank gets all continuations.

    Context-parallel ranks share no rows here: a token of a row is the work of one rank, and so is a whole prompt, whose
    activations a forward pass holds of one layer only. The caches of their rows take as much memory on each rank as
    slices of all caches would.

    On a pipeline twice as many batches as stages are on their way at once. The caches are cut by tp and pp.
    """

    def __init__(self, engine: Engine, run: RunConfig, layout: Layout, rows: int = ROWS) -> None:
        module = engine.deepspeed.module
        self.engine, self.context = engine, engine.context
        self.positions = min(run.data.seq_len, position_limit(engine.context))
        self.rows = max(rows, layout.micro_batch)
        self.in_flight = 1 if layout.pp == 1 else 2 * layout.pp
        self.ranks, self.rank = layout.data_axis, own_data_rank(layout)
        self.dtype = next(module.parameters()).dtype
        self.device = world.device()
        self.layers = sum(isinstance(part, DecoderLayer) for part in module.modules())
        self._gathers_weights = run.zero_stage == 3

    def next_tokens(self, passes: Sequence[DecodePass]) -> list[Tensor]:
        return self.engine.next_tokens(passes)

    def anyone(self, runs: bool) -> bool:
        """Return whether this rank continues: under ZeRO-3 until all ranks have ended, because each holds weights."""
        if not self._gathers_weights:
            return runs
        return bool(world.maximum([float(runs)], torch.device(self.device))[0])

    def gather(self, found: dict[int, list[int]]) -> dict[int, list[int]]:
        return {number: ids for part in world.gather(found) for number, ids in part.items()}
