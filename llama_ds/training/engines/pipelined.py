"""pp > 1: the pipeline engine of `llama_ds.parallel.pipeline_engine` with ZeRO-1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from llama_ds.config.schema import RunConfig
from llama_ds.layout.layout import Layout
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.model.decoder import Ids
from llama_ds.model.graphed_layers import GraphedChunk
from llama_ds.model.next_token import DecodePass
from llama_ds.parallel.early_reads import issued, reading
from llama_ds.parallel.pipeline import LlamaPipeline
from llama_ds.parallel.pipeline_engine import LlamaPipelineEngine
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


def build_pipelined(
    run: RunConfig, layout: Layout, config: dict[str, Any], parts: LayerParts, trains: bool = True
) -> PipelinedEngine:
    """Build this rank's stages from layer specs; each layer has its own optimizer groups. Collective."""
    schedule = schedule_of(run, layout)
    module = LlamaPipeline(run, layout, schedule.placement, parts.context, parts.loss, parts.policies)
    if run.logging.check_finite:
        check_layers(module.numbered_layers(), run.model.num_hidden_layers)
    layers = _named_layers(module)
    groups = [group for name, layer in layers for group in decay_groups(layer, run.optimizer, run.model, name)]
    optimizer = build_optimizer(groups, run, config) if trains else None
    freeze_imports()
    rows = (layout.micro_batch, run.data.seq_len)
    apart = run.checkpoint.compare_repeats > 0  # it repeats layers for the first micro-batch
    engine = LlamaPipelineEngine(
        module, schedule, parts.context, rows, parts.dtype, optimizer, config, parts.trace, apart
    )
    if trains:
        accumulate_in_fp32(parts.context.weight_gradients, engine.optimizer)
        attach_optimizer(engine, run, layout)
        if run.parallel.post_validation:
            engine.optimizer.validate_later()
        parts.context.weight_gradients.added = engine.optimizer.gradient_added
    if parts.graphs is not None:
        for chunk in engine.manual_layers:
            GraphedChunk(chunk, parts.context.weight_gradients, parts.graphs)
    return PipelinedEngine(engine, parts)


def _named_layers(module: LlamaPipeline) -> Iterator[tuple[str, nn.Module]]:
    """Yield this rank's layers with the names of their optimizer groups; each parameter occurs once.

    A tied table has its own name instead of "layer 0", because the last stage holds it too.
    """
    yield from ((f"tied {key} ", table) for key, table in module.tied_modules.items())
    tied = set(module.tied_modules.values())
    yield from ((f"layer {index} ", layer) for index, layer in module.numbered_layers() if layer not in tied)


class PipelinedEngine:
    """Takes steps by the run's pipeline schedule."""

    any_row_length = True

    def __init__(self, engine: LlamaPipelineEngine, parts: LayerParts) -> None:
        self.deepspeed, self.trace, self.loss, self.context = engine, parts.trace, parts.loss, parts.context
        self.dp_rank = parts.dp_rank
        self.reads_data = engine.reads_data()
        self._last: StepResult | None = None

    def train_step(self, batches: Iterator[Batch], lr: float) -> StepResult:
        summary = self.deepspeed.train_step(
            self._ids_and_labels(batches), lambda: set_learning_rate(self.deepspeed, lr)
        )
        self.context.products.end_step()
        settled = not self.deepspeed.optimizer.unsettled  # else the next step completes the result
        loss, norm = summary.unbind()
        self._last = StepResult(loss, norm, issued(self.deepspeed.device) if settled else None)
        return self._last

    def read(self, result: StepResult) -> tuple[float, float]:
        if result is self._last:
            self.deepspeed.optimizer.settle()
        with reading(self.deepspeed.device, result.ready) if result.ready else nullcontext():
            loss, norm = float(result.loss), float(result.norm)
        self.deepspeed.optimizer.last_norm = norm
        return loss, norm

    def evaluate(
        self, batches: Batches, count: int, tokens: int | None = None, branches: Branches | None = None
    ) -> float:
        return float(self.deepspeed.mean_loss(self._ids_and_labels(batches), count, tokens, branches))

    def next_tokens(self, passes: Sequence[DecodePass]) -> list[Tensor]:
        return self.deepspeed.next_tokens(passes)

    def _ids_and_labels(self, batches: Batches) -> Iterator[tuple[Ids, Tensor]]:
        return (training_pair(batch, self.deepspeed.device, self.loss, self.context) for batch in batches)
