"""pp = 1: the full model under DeepSpeedEngine with ZeRO 0 to 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor

from llama_ds.config.schema import RunConfig
from llama_ds.layout.layout import Layout
from llama_ds.model.embedding import Head
from llama_ds.model.graphed_layers import GraphedChunk
from llama_ds.model.llama import Llama
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.model.next_token import DecodePass
from llama_ds.parallel import world
from llama_ds.parallel.deepspeed_trace import collectives_recorded
from llama_ds.parallel.early_reads import issued, reading
from llama_ds.parallel.grid import grid
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


def build_single_stage(
    run: RunConfig, layout: Layout, config: dict[str, Any], parts: LayerParts, device: torch.device, trains: bool = True
) -> SingleStageEngine:
    """Build the model, under ZeRO-3 already partitioned, and initialise DeepSpeed with it. Collective."""
    mpu = grid(layout)
    checkpointed = parts.policies is None and run.parallel.recompute == "full"
    with _zero_init(run, config, mpu):
        module = Llama(parts.context, parts.loss, parts.policies, checkpointed)
    if run.zero_stage == 3:
        # These modules read their submodules' weights directly, so ZeRO must gather each as a unit.
        units = {type(part) for part in module.modules()} & {ManualBackwardLayer, Head}
        if units:
            set_z3_leaf_modules(module, list(units))
    if run.logging.check_finite:
        check_layers(enumerate(module.layers), run.model.num_hidden_layers)
    updates = trains or run.zero_stage == 3  # where the optimizer holds what the layers are gathered from
    optimizer = build_optimizer(decay_groups(module, run.optimizer, run.model), run, config) if updates else None
    if not updates:  # ZeRO-1 and 2 cut the states of an optimizer
        config = config | {"zero_optimization": {"stage": 0}}
    compare_norms()
    freeze_imports()
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, mpu=mpu)
    if updates:
        accumulate_in_fp32(parts.context.weight_gradients, engine.optimizer)
        attach_optimizer(engine, run, layout)
    if parts.graphs is not None:
        layers = [layer for layer in module.layers if isinstance(layer, ManualBackwardLayer)]
        GraphedChunk(layers, parts.context.weight_gradients, parts.graphs)
    return SingleStageEngine(engine, layout.accumulation, device, parts)


def _zero_init(run: RunConfig, config: dict[str, Any], mpu: Any) -> AbstractContextManager[Any]:
    """Return the context in which ZeRO-3 partitions each layer once it is built, so no rank holds the full model."""
    if run.zero_stage < 3:
        return nullcontext()
    return deepspeed.zero.Init(data_parallel_group=mpu.get_data_parallel_group(), config_dict_or_path=config, mpu=mpu)


class SingleStageEngine:
    """Takes steps micro-batch by micro-batch."""

    any_row_length = True

    def __init__(self, engine: Any, accumulation: int, device: torch.device, parts: LayerParts) -> None:
        self.deepspeed, self.trace, self.loss, self.context = engine, parts.trace, parts.loss, parts.context
        self.dp_rank = parts.dp_rank
        self.accumulation = accumulation
        self.device = device
        self.reads_data = True
        # DeepSpeed's collectives run in the forward under ZeRO-3, in the backward of every micro-batch from ZeRO-2 on,
        # else in the last backward only. Time that includes collectives does not count as this rank's own.
        self._forward_waits = engine.zero_optimization_stage() == 3
        self._backward_waits = engine.zero_optimization_stage() >= 2
        if engine.zero_optimization_stage() == 0 and engine.dp_world_size == 1:
            engine.enable_backward_allreduce = False  # a reduction over one rank would still copy every gradient
        # Only in fp32 without ZeRO, DeepSpeed discards the gradient norm after clipping, and takes steps with
        # gradients that are not finite.
        engine.clip_fp32_gradients = self._clip_and_keep_norm

    def _clip_and_keep_norm(self) -> None:
        engine = self.deepspeed
        norm = clip_grad_norm_(engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu)
        engine._global_grad_norm = norm
        engine.optimizer.found_inf = (~norm.isfinite()).float()  # torch's fused AdamW skips the step on the device

    def train_step(self, batches: Iterator[Batch], lr: float) -> StepResult:
        engine = self.deepspeed
        engine.train()
        set_learning_rate(engine, lr)
        total = torch.zeros((), device=self.device)
        trace = self.trace
        step_begin = trace.now()
        with collectives_recorded(trace):
            for i in range(self.accumulation):
                total += self._micro_batch(i, batches)
            self.context.products.end_step()
        trace.end_step(step_begin)
        loss = total / self.accumulation
        work = world.start_sum(loss, engine.mpu.get_data_parallel_group())  # now, not behind the next step's
        return StepResult(loss, engine.get_global_grad_norm(), issued(self.device), work)

    def _micro_batch(self, i: int, batches: Iterator[Batch]) -> Tensor:
        """Run the forward and backward of micro-batch i, and after the last one the update; return the loss."""
        engine, trace = self.deepspeed, self.trace
        trace.doing = f"forward of micro-batch {i}"
        begin = trace.mark()
        batch = next(batches)
        trace.add("wait data", begin)
        held = trace.times.now() if trace.times.counting and self._forward_waits else None
        begin = trace.now()
        loss = engine(*training_pair(batch, self.device, self.loss, self.context))
        trace.add("F", begin, 0, i)
        trace.doing = f"backward of micro-batch {i}, and the reduction in it"
        if held is None and trace.times.counting and (self._backward_waits or i == self.accumulation - 1):
            held = trace.times.now()
        begin = trace.now()
        engine.backward(loss)
        trace.add("BW", begin, 0, i)
        trace.doing, trace.waits = "the optimizer's step", True
        begin = trace.now()
        engine.step()
        trace.add("optimizer", begin, 0, i)
        trace.waits = False
        if held is not None:
            trace.times.add("with collectives", held)
        return loss.detach()

    def read(self, result: StepResult) -> tuple[float, float]:
        with reading(self.device, result.ready):
            if result.work is not None:
                result.work.wait()
            ranks = world.size_of(self.deepspeed.mpu.get_data_parallel_group())
            return float(result.loss) / ranks, float(result.norm)

    @torch.no_grad()
    def evaluate(
        self, batches: Batches, count: int, tokens: int | None = None, branches: Branches | None = None
    ) -> float:
        self.deepspeed.eval()
        total = torch.zeros((), device=self.device)
        with self.context.whole_rows() if branches else nullcontext():
            for i, batch in enumerate(batches):
                with self.context.caches.using(branches(i) if branches else None):
                    total += self.deepspeed(*training_pair(batch, self.device, self.loss, self.context))
        return world.mean(total / count, self.deepspeed.mpu.get_data_parallel_group())

    @torch.no_grad()
    def next_tokens(self, passes: Sequence[DecodePass]) -> list[Tensor]:
        self.deepspeed.eval()
        found = []
        with self.context.whole_rows():
            for one in passes:
                with self.context.caches.using(one.cache):
                    found.append(one.choose(self.deepspeed(one.ids, None, one.last)))
        return found
