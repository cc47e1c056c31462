"""pp > 1: DeepSpeed's PipelineEngine unchanged, with ZeRO-1, as a reference for measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
from torch import Tensor

from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import Layout
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.model.decoder import Ids
from llama_ds.model.next_token import DecodePass
from llama_ds.parallel.pipeline import LlamaPipeline
from llama_ds.parallel.stock_trace import trace_instructions
from llama_ds.parallel.whole_gradients import compare_norms
from llama_ds.training.device_batches import Batch, Batches, training_pair
from llama_ds.training.engines.interface import Branches, StepResult
from llama_ds.training.engines.layer_parts import LayerParts
from llama_ds.training.engines.optimizer_groups import (
    accumulate_in_fp32,
    attach_optimizer,
    build_optimizer,
    decay_groups,
    set_learning_rate,
)
from llama_ds.training.host_memory import freeze_imports
from llama_ds.training.nan_check import check_layers


def build_stock(run: RunConfig, layout: Layout, config: dict[str, Any], parts: LayerParts) -> StockPipelinedEngine:
    """Build this rank's stage from layer specs and initialise DeepSpeed with it. Collective."""
    module = LlamaPipeline(run, layout, schedule_of(run, layout).placement, parts.context, parts.loss, parts.policies)
    if run.logging.check_finite:
        check_layers(module.numbered_layers(), run.model.num_hidden_layers)
    optimizer = build_optimizer(decay_groups(module, run.optimizer, run.model), run, config)
    compare_norms()
    freeze_imports()
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)  # the module brings its grid
    accumulate_in_fp32(parts.context.weight_gradients, engine.optimizer)
    attach_optimizer(engine, run, layout)
    return StockPipelinedEngine(engine, parts)


class StockPipelinedEngine:
    """Takes steps by DeepSpeed's own 1F1B schedule."""

    any_row_length = False

    def __init__(self, engine: Any, parts: LayerParts) -> None:
        self.deepspeed, self.trace, self.loss, self.context = engine, parts.trace, parts.loss, parts.context
        self.dp_rank = parts.dp_rank
        self.reads_data = engine.is_first_stage() or engine.is_last_stage()
        trace_instructions(engine, parts.trace)

    def train_step(self, batches: Iterator[Batch], lr: float) -> StepResult:
        set_learning_rate(self.deepspeed, lr)
        begin = self.trace.now()
        loss = self.deepspeed.train_batch(self._ids_and_labels(batches))
        self.context.products.end_step()
        self.trace.end_step(begin)
        return StepResult(loss, self.deepspeed.get_global_grad_norm())

    def read(self, result: StepResult) -> tuple[float, float]:
        return float(result.loss), float(result.norm)

    def evaluate(
        self, batches: Batches, count: int, tokens: int | None = None, branches: Branches | None = None
    ) -> float:
        assert tokens is None and branches is None, "DeepSpeed's engine keeps the shape of its first messages"
        return float(self.deepspeed.eval_batch(self._ids_and_labels(batches), num_micro_batches=count))

    def next_tokens(self, passes: Sequence[DecodePass]) -> list[Tensor]:
        raise UserError(
            "parallel.schedule = deepspeed: DeepSpeed's own pipeline cannot generate text; use another schedule"
        )

    def _ids_and_labels(self, batches: Batches) -> Iterator[tuple[Ids, Tensor]] | None:
        """Return an iterator over the pairs, or None on the stages between the first and the last."""
        if not self.reads_data:
            return None
        return (training_pair(batch, self.deepspeed.device, self.loss, self.context) for batch in batches)
