"""DeepSpeed's two engines behind one small interface: a pipeline, or one stage with any ZeRO.

Shapes: b micro-batch rows, T tokens; a micro-batch is an integer array (b, T + 1) whose columns overlap as inputs and
labels, or one on its way to the device.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from llama_ds.config.rules import STOCK_ENGINE
from llama_ds.config.schema import OptimizerConfig, RunConfig
from llama_ds.layout.layout import Layout
from llama_ds.layout.optimizer_states import ADAMW
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.layout.recompute import stage_policies
from llama_ds.layout.weights import weight_of
from llama_ds.model.embedding import Head
from llama_ds.model.llama import Llama, shared_parts
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.written_out import WrittenOutLayer
from llama_ds.parallel import world
from llama_ds.parallel.deepspeed_trace import collectives_recorded
from llama_ds.parallel.grid import grid, tensor_parallel
from llama_ds.parallel.pipeline import LlamaPipeline
from llama_ds.parallel.pipeline_engine import LlamaPipelineEngine
from llama_ds.parallel.pipeline_optimizer import PipelineOptimizer
from llama_ds.parallel.stock_trace import trace_instructions
from llama_ds.parallel.trace import Trace
from llama_ds.training.device_batches import Arriving
from llama_ds.training.finite import check_layers, layer_name
from llama_ds.training.host_memory import keep_freed_memory

Batch = np.ndarray | Arriving
Batches = Iterable[Batch]


@dataclass(frozen=True)
class StepResult:
    """What a step gave, still on the device: reading it waits for the device."""

    loss: Tensor  # mean over the global batch; with one stage over this rank's share of it
    norm: Tensor | float  # of the gradients before clipping


class Engine(Protocol):
    """One rank's part of the model, its optimizer and its place in the grid."""

    deepspeed: Any  # the DeepSpeed engine
    dp_rank: int
    reads_data: bool  # first and last pipeline stage only
    trace: Trace

    def train_step(self, batches: Iterator[Batch], lr: float) -> StepResult:
        """Take one optimizer step over `accumulation` micro-batches."""

    def read(self, result: StepResult) -> tuple[float, float]:
        """Return a step's global mean loss and gradient norm, the same on all ranks. Collective; synchronises."""

    def evaluate(self, batches: Batches, count: int) -> float:
        """Return the mean loss over `count` micro-batches of every data-parallel rank. Collective."""


def build_engine(run: RunConfig, layout: Layout, config: dict[str, Any], device: torch.device) -> Engine:
    """Build this rank's layers, partition them and hand them to DeepSpeed with the merged `config`. Collective."""
    # Or DeepSpeed compiles its shared-memory all-reduce at start, which only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)  # adopts the process group that world.join made
    if device.type == "cpu":
        keep_freed_memory()
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    trace = Trace(device)
    tp = tensor_parallel(layout, run.parallel.sequence_parallel, trace)
    shared = shared_parts(run, tp, device.type, dtype)
    shared = replace(shared, recomputing=partial(trace.around, "recompute"))
    loss = NextTokenLoss(shared.tp, run.optimizer.z_loss, shared.weight_gradients)
    policies = save_policies(run, layout, dtype.itemsize)
    # DeepSpeed prints its topology and seeds to stdout, which belongs to the run's own lines.
    with redirect_stdout(io.StringIO()):
        if layout.pp > 1:
            place = schedule_of(run, layout).place
            module: nn.Module = LlamaPipeline(run, layout, place, shared, loss, policies)
            mpu = None  # the pipeline module brings its grid
        else:
            mpu = grid(layout)
            with zero_init(run, config, mpu):
                module = Llama(shared, loss, policies, policies is None and run.parallel.recompute == "full")
            if run.zero_stage == 3:  # these read their submodules' weights themselves: gather them as a whole
                set_z3_leaf_modules(module, [WrittenOutLayer, Head])
        if run.logging.check_finite:
            check_layers(_named_layers(module, run.model.num_hidden_layers))
        scheduled = module if isinstance(module, LlamaPipeline) and run.parallel.schedule != STOCK_ENGINE else None
        named = _layers_of_pipeline(scheduled) if scheduled else [("", module)]
        groups = [group for name, part in named for group in decay_groups(part, run.optimizer, name)]
        optimizer = build_optimizer(groups, run.optimizer, config)
        # DeepSpeed's optimizer collects garbage on rank 0 before and after each group, 0.2 s each with what is imported
        # by now. Nothing of that will ever be garbage.
        gc.freeze()
        if scheduled:
            rows, schedule = (layout.micro_batch, run.data.seq_len), schedule_of(run, layout)
            engine: Any = LlamaPipelineEngine(scheduled, schedule, shared, rows, dtype, optimizer, config, trace)
        else:
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, mpu=mpu)
    if isinstance(engine.optimizer, BF16_Optimizer):
        shared.weight_gradients.buffer_of = _fp32_gradients(engine.optimizer)
    if isinstance(engine.optimizer, PipelineOptimizer):
        shared.weight_gradients.added = engine.optimizer.gradient_added
        return PipelinedEngine(engine, trace)
    if layout.pp > 1:
        return StockPipelinedEngine(engine, trace)
    return SingleStageEngine(engine, layout.accumulation, device, trace)


def _named_layers(module: nn.Module, num_hidden_layers: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield this rank's layers with the names that people call them by."""
    layers: Any = module.numbered_layers() if isinstance(module, LlamaPipeline) else enumerate(module.layers)  # type: ignore[arg-type]
    for index, layer in layers:
        yield layer_name(index, num_hidden_layers), layer


def _fp32_gradients(optimizer: BF16_Optimizer) -> Callable[[nn.Parameter], Tensor]:
    """Return where the optimizer accumulates a parameter's gradient: what it does with a bf16 one, without that one.

    The gradient then never exists in bf16, is not zeroed and not copied.
    """
    place = {id(p): (i, j) for i, group in enumerate(optimizer.bf16_groups) for j, p in enumerate(group)}

    def buffer_of(parameter: nn.Parameter) -> Tensor:
        i, j = place[id(parameter)]
        buffer = optimizer.fp32_groups_gradients[i][j]
        optimizer.fp32_groups_has_gradients[i][j] = True
        parameter._hp_grad = buffer  # type: ignore[attr-defined]
        return buffer.view(parameter.shape)

    return buffer_of


def save_policies(run: RunConfig, layout: Layout, element_bytes: int) -> list[str] | None:
    """Return the save policy of every decoder layer, None where the run wants layers by autograd."""
    if run.parallel.decoder_layer == "autograd":
        return None
    return [policy for stage in stage_policies(run, layout, element_bytes) for policy in stage.policies]


def zero_init(run: RunConfig, config: dict[str, Any], mpu: Any) -> AbstractContextManager[Any]:
    """Return the context in which ZeRO-3 partitions each layer as soon as it is built: no rank ever holds the model."""
    if run.zero_stage < 3:
        return nullcontext()
    return deepspeed.zero.Init(data_parallel_group=mpu.get_data_parallel_group(), config_dict_or_path=config, mpu=mpu)


def _layers_of_pipeline(module: LlamaPipeline) -> Iterator[tuple[str, nn.Module]]:
    """Yield this rank's layers with the names of their optimizer groups, each parameter once.

    A tied table has a name of its own: it is the last stage's too, and that holds no layer 0.
    """
    yield from ((f"tied {key} ", table) for key, table in module.tied_modules.items())
    tied = set(module.tied_modules.values())
    yield from ((f"layer {index} ", layer) for index, layer in module.numbered_layers() if layer not in tied)


def decay_groups(module: nn.Module, settings: OptimizerConfig, name: str = "") -> list[dict[str, Any]]:
    """Return optimizer groups of what `module` has of matrices, which decay, and norm weights, which do not.

    Weights of one group have the same states, which lie in buffers of the whole group.
    """
    groups: dict[tuple[bool, tuple[str, ...]], list[nn.Parameter]] = {}
    for parameter_name, parameter in module.named_parameters():
        weight = weight_of(parameter_name)
        groups.setdefault((weight.decays, ADAMW.kinds(weight.role)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": settings.weight_decay * decays, "name": name + label}
        for decays, label in ((True, "matrices"), (False, "norms"))
        for (decaying, _), parameters in groups.items()
        if decaying == decays
    ]


def build_optimizer(
    groups: list[dict[str, Any]], settings: OptimizerConfig, config: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return AdamW over `groups`."""
    if "offload_optimizer" in config["zero_optimization"]:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def _set_learning_rate(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def _split(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = batch.take() if isinstance(batch, Arriving) else torch.from_numpy(batch).to(device).long()
    return rows[:, :-1], rows[:, 1:]


def _split_all(batches: Batches, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    return (_split(batch, device) for batch in batches)


class SingleStageEngine:
    """pp = 1: DeepSpeedEngine with ZeRO 0 to 3."""

    def __init__(self, engine: Any, accumulation: int, device: torch.device, trace: Trace) -> None:
        self.deepspeed, self.trace = engine, trace
        self.accumulation = accumulation
        self.device = device
        self.dp_rank = engine.mpu.get_data_parallel_rank()
        self.reads_data = True
        # Where DeepSpeed's collectives are: in a forward under ZeRO-3, in every micro-batch's backward from ZeRO-2 on,
        # else in the last one's. What holds some is not this rank's own time.
        self._forward_waits = engine.zero_optimization_stage() == 3
        self._backward_waits = engine.zero_optimization_stage() >= 2
        if engine.zero_optimization_stage() == 0 and engine.dp_world_size == 1:
            engine.enable_backward_allreduce = False  # there is nobody to reduce with, but it copies every gradient
        # fp32 without ZeRO is the one case in which DeepSpeed computes the norm, clips by it and drops it.
        engine.clip_fp32_gradients = self._clip_and_keep_norm

    def _clip_and_keep_norm(self) -> None:
        engine = self.deepspeed
        engine._global_grad_norm = clip_grad_norm_(
            engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu
        )

    def train_step(self, batches: Iterator[Batch], lr: float) -> StepResult:
        engine = self.deepspeed
        engine.train()
        _set_learning_rate(engine, lr)
        total = torch.zeros((), device=self.device)
        trace = self.trace
        step_begin = trace.now()
        with collectives_recorded(trace):
            for i in range(self.accumulation):
                total += self._micro_batch(i, batches)
        trace.end_step(step_begin)
        return StepResult(total / self.accumulation, engine.get_global_grad_norm())

    def _micro_batch(self, i: int, batches: Iterator[Batch]) -> Tensor:
        """Take the i-th micro-batch of a step forward and backward, and after the last the step; return its loss."""
        engine, trace = self.deepspeed, self.trace
        trace.doing = f"forward of micro-batch {i}"
        begin = trace.mark()
        batch = next(batches)
        trace.add("wait data", begin)
        held = trace.times.now() if trace.times.counting and self._forward_waits else None
        begin = trace.now()
        loss = engine(*_split(batch, self.device))
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
        return world.mean(result.loss, self.deepspeed.mpu.get_data_parallel_group()), float(result.norm)

    @torch.no_grad()
    def evaluate(self, batches: Batches, count: int) -> float:
        self.deepspeed.eval()
        total = torch.zeros((), device=self.device)
        for batch in batches:
            total += self.deepspeed(*_split(batch, self.device))
        return world.mean(total / count, self.deepspeed.mpu.get_data_parallel_group())


class PipelinedEngine:
    """pp > 1: the pipeline engine of `llama_ds.parallel.pipeline_engine` with ZeRO-1."""

    def __init__(self, engine: LlamaPipelineEngine, trace: Trace) -> None:
        self.deepspeed, self.trace = engine, trace
        self.dp_rank = engine.grid.get_data_parallel_rank()
        self.reads_data = engine.reads_data()

    def train_step(self, batches: Iterator[Batch], lr: float) -> StepResult:
        _set_learning_rate(self.deepspeed, lr)
        loss, norm = self.deepspeed.train_step(_split_all(batches, self.deepspeed.device)).unbind()
        return StepResult(loss, norm)

    def read(self, result: StepResult) -> tuple[float, float]:
        return float(result.loss), float(result.norm)

    def evaluate(self, batches: Batches, count: int) -> float:
        return float(self.deepspeed.mean_loss(_split_all(batches, self.deepspeed.device), count))


class StockPipelinedEngine:
    """pp > 1: DeepSpeed's PipelineEngine as it is, with ZeRO-1, to measure against."""

    def __init__(self, engine: Any, trace: Trace) -> None:
        self.deepspeed, self.trace = engine, trace
        self.dp_rank = engine.grid.get_data_parallel_rank()
        self.reads_data = engine.is_first_stage() or engine.is_last_stage()
        trace_instructions(engine, trace)

    def train_step(self, batches: Iterator[Batch], lr: float) -> StepResult:
        _set_learning_rate(self.deepspeed, lr)
        begin = self.trace.now()
        loss = self.deepspeed.train_batch(self._split_all(batches))
        self.trace.end_step(begin)
        return StepResult(loss, self.deepspeed.get_global_grad_norm())

    def read(self, result: StepResult) -> tuple[float, float]:
        return float(result.loss), float(result.norm)

    def evaluate(self, batches: Batches, count: int) -> float:
        return float(self.deepspeed.eval_batch(self._split_all(batches), num_micro_batches=count))

    def _split_all(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]] | None:
        return _split_all(batches, self.deepspeed.device) if self.reads_data else None
