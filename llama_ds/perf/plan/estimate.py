"""Estimate of one run on one layout and machine: memory, step time and their components."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from llama_ds.config.deepspeed_json import deepspeed_config, training_dtype
from llama_ds.config.row_stages import first_step, stage_steps, stages_key
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.layout.partition import decoder_layers, stage_boundaries
from llama_ds.layout.planned_documents import assumption
from llama_ds.layout.recompute import GIB, StagePolicies, stage_policies, with_device_memory
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import job_of, layers_by_policy
from llama_ds.perf.plan.likely import Interval, likely_speed
from llama_ds.perf.plan.memory import Memory, run_memory
from llama_ds.perf.plan.sharing_costs import sharing_costs
from llama_ds.perf.plan.step import StepTime, step_time
from llama_ds.schedules.zero_bubble_v import V_SCHEDULES


@dataclass(frozen=True)
class Estimate:
    """A layout with its estimated memory and step time."""

    run: RunConfig
    layout: Layout
    gpu: Hardware
    policies: tuple[StagePolicies, ...]
    memory: tuple[Memory, ...]  # one entry per pipeline rank
    step: StepTime

    @property
    def peak_bytes(self) -> float:
        return max(rank.total for rank in self.memory)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.gpu.memory_bytes

    @property
    def days(self) -> float:
        """Duration of the run, or of its stage (`stages_key`), in days without interruptions."""
        return len(stage_steps(self.run, first_step(self.run))) * self.step.seconds / 86400

    @property
    def tokens(self) -> int:
        """Tokens of the run, or of its stage (`stages_key`)."""
        if not stages_key(self.run):
            return self.run.training.tokens
        steps = len(stage_steps(self.run, first_step(self.run)))
        return steps * self.run.training.global_batch * self.run.data.seq_len


def with_partition(run: RunConfig) -> RunConfig:
    """Return the run with an explicit partition: its own, or else the balanced one."""
    counts = tuple(decoder_layers(stage_boundaries(run)))
    return replace(run, parallel=replace(run.parallel, partition=counts))


def filled(run: RunConfig, layout: Layout) -> Layout:
    """Return the layout with just enough micro-batches to fill its pipeline; more do not need more memory.

    Those of a zero-bubble V may, because its order is computed.
    """
    if run.parallel.schedule in V_SCHEDULES:
        return layout
    period = math.lcm(layout.pp, run.parallel.joint_weight_gradients)
    enough = 3 * period
    if layout.accumulation <= enough + period:
        return layout
    return replace(layout, accumulation=enough + layout.accumulation % period)


def held_by(run: RunConfig, layout: Layout, gpu: Hardware) -> tuple[tuple[StagePolicies, ...], tuple[Memory, ...]]:
    """Return the stages' save policies and the ranks' memory.

    Raises:
        UserError: Even full recompute exceeds the recompute budget.
    """
    enough = filled(run, layout)
    policies = tuple(stage_policies(run, enough, gpu.element_bytes))
    return policies, tuple(run_memory(run, enough, policies, gpu.memory_bytes, gpu.element_bytes))


def estimate(run: RunConfig, world: int, gpu: Hardware) -> Estimate:
    """Return the estimate of the run with its own layout.

    Args:
        world: number of GPUs.
        gpu: the kind of machine, such as `hardware.load("a100-80gb")`.

    Raises:
        UserError: The trainer would refuse the layout, or the machine's description is for another dtype.
    """
    layout = resolve_layout(run, world)
    native = gpu.dtype == "bf16"
    deepspeed_config(run, layout, native)
    dtype = training_dtype(run, native)
    if dtype != gpu.dtype:
        raise UserError(
            f"{run.deepspeed_path}: bf16.enabled makes this a run in {dtype}, and {gpu.name} is described for "
            f"{gpu.dtype}: set it to {str(native).lower()}"
        )
    check_peak(run, gpu)
    for section in ("offload_optimizer", "offload_param"):
        if run.deepspeed.get("zero_optimization", {}).get(section):
            raise UserError(
                f"{run.deepspeed_path}: zero_optimization.{section}: the planner does not model "
                "host memory and its bandwidth; remove it to plan without offload"
            )
    run = with_device_memory(with_partition(run), gpu.memory_bytes)
    policies, memory = held_by(run, layout, gpu)
    return Estimate(run, layout, gpu, policies, memory, step_time(gpu, job_of(run, layout, policies, gpu.dtype)))


def check_peak(run: RunConfig, gpu: Hardware) -> None:
    """Raise UserError for a run in float8 on a machine that has none, or whose peak in float8 is unknown."""
    if run.compute.fp8 != "off" and gpu.fp8_speedup is None:
        raise UserError(
            f"{run.path}: compute.fp8 = {run.compute.fp8}: layout/flops.py has no float8 peak for {gpu.device} "
            f"({gpu.name}); set compute.fp8=off, or plan for Hopper"
        )


def as_data(found: Estimate) -> dict[str, Any]:
    """Return the estimate as plain data for JSON, in seconds, GiB and fractions of 1."""
    step, parallel, layout = found.step, found.run.parallel, found.layout
    sharing = sharing_costs(found.gpu, step)
    return {
        "gpu": found.gpu.name,
        "gpus": layout.world,
        "layout": {**layout.as_data(), "schedule": parallel.schedule, "virtual_stages": parallel.virtual_stages},
        "sequence_parallel": parallel.sequence_parallel,
        "extra_warmup": parallel.extra_warmup,
        "pass_times": parallel.pass_times,
        "post_validation": parallel.post_validation,
        "tp_chunks": parallel.tp_chunks,
        "joint_weight_gradients": parallel.joint_weight_gradients,
        "cuda_graphs": parallel.cuda_graphs,
        "gradients": "bf16" if found.run.reduces_in_bf16 else "fp32",
        "gradient_neighbours": parallel.gradient_neighbours,
        "zero_stage": found.run.zero_stage,
        "recompute": [dict(counts) for counts in step.job.stages],
        "step_s": step.seconds,
        "tokens_per_s_per_gpu": step.tokens_per_second,
        "mfu": step.mfu(found.gpu),
        "days": found.days,
        "bubble": step.bubble,
        "pipeline_s": step.pipeline,
        "stragglers_s": step.stragglers,
        "reduction_s": step.reduction,
        "optimizer_s": step.optimizer,
        "host_s": step.host,
        "context_parallel": asdict(sharing) if sharing else None,
        "documents": {"assumed": assumption(found.run), "mean_keys": step.job.documents.keys},
        "likely_tokens_per_s_per_gpu": likely[:2] if (likely := likely_speed(found.gpu, step)) else None,
        "fits": found.fits,
        "peak_memory_gib": found.peak_bytes / GIB,
        "memory_gib": [{name: value / GIB for name, value in asdict(rank).items()} for rank in found.memory],
    }


def _likely_words(found: Interval) -> str:
    return (
        f"  likely         {found.low:,.0f} to {found.high:,.0f} tokens/s/GPU; of {found.runs:,} measured runs like it "
        f"on average over the sources, {found.covered:.0%} lay in the interval of the others"
    )


def _attention_words(found: Estimate) -> str:
    """Return which documents the estimate counts, and how much attention they leave."""
    job = found.step.job
    return (
        f"of {assumption(found.run)}: a token sees {job.documents.keys:,.0f} tokens on average, "
        f"{2 * job.documents.keys / (job.seq_len + 1):.1%} of those in rows of one document"
    )


def report(found: Estimate) -> str:
    """Return the estimate as text."""
    step, layout, parallel = found.step, found.layout, found.run.parallel
    sharing, likely = sharing_costs(found.gpu, step), likely_speed(found.gpu, step)
    cut = f", tensor-parallel collectives in {parallel.tp_chunks} chunks" if parallel.tp_chunks > 1 else ""
    sent = ", gradients in bf16" if found.run.reduces_in_bf16 else ""
    sent += f" behind sums of {near} neighbours" if (near := parallel.gradient_neighbours) > 1 else ""
    muon = found.run.optimizer.name == "muon"
    lines = [
        f"{found.run.name} on {layout.world:,} x {found.gpu.name}: {layout.words(' ')}, "
        f"{parallel.schedule if layout.pp > 1 else 'no pipeline'}"
        f"{f' with {parallel.virtual_stages} stages a rank' if parallel.virtual_stages > 1 else ''}"
        f"{f', extra warm-up {parallel.extra_warmup}' if parallel.extra_warmup else ''}"
        f"{f', {joint} weight gradients at a time' if (joint := parallel.joint_weight_gradients) > 1 else ''}"
        f"{', layers as CUDA graphs' if parallel.cuda_graphs else ''}"
        f"{', steps begin before the norm' if parallel.post_validation else ''}"
        f"{cut}{sent}, ZeRO-{found.run.zero_stage}",
        f"  batch          {layout.global_batch:,} rows of {found.run.data.seq_len:,} = dp {layout.dp} x micro-batch "
        f"{layout.micro_batch} x {layout.accumulation} micro-batches",
        f"  step           {step.seconds:.3f} s = pipeline {step.pipeline:.3f} + reduction {step.reduction:.3f} + "
        f"optimizer {step.optimizer:.3f} + host {step.host:.3f}",
        f"  bubble         {step.bubble:.1%} of the pipeline's time",
        f"  speed          {step.tokens_per_second:,.0f} tokens/s/GPU, MFU {step.mfu(found.gpu):.1%}, "
        f"{found.days:.1f} days for {found.tokens:.3g} tokens",
        *([_likely_words(likely)] if likely else []),
        f"  memory         {found.peak_bytes / GIB:.1f} of {found.gpu.memory_gib:.0f} GiB"
        f"{'' if found.fits else ': DOES NOT FIT'}",
        *([f"  context        {sharing.words()}"] if sharing else []),
        *([f"  attention      {_attention_words(found)}"] if found.run.data.document_mask else []),
        "",
        f"  {'rank':>4} {'layers':>7} {'recompute':24} {'weights':>8} {'grads':>7} {'optim':>7} {'activ':>7} "
        f"{'working':>8} {'margin':>7} {'matrices ' * muon}{'GiB':>7}",
    ]
    placement = step.job.placement
    for rank, held in enumerate(found.memory):
        own = [step.job.stages[placement.stage(rank, chunk)] for chunk in range(placement.chunks)]
        counts = layers_by_policy(own)
        words = ", ".join(f"{number} {policy}" for policy, number in counts.items())
        parts = [held.weights, held.gradients, held.optimizer, held.activations, held.working, held.margin]
        parts += [*((held.matrices,) * muon), held.total]
        widths = (8, 7, 7, 7, 8, 7, *((8,) * muon), 7)
        numbers = " ".join(f"{value / GIB:{width}.1f}" for value, width in zip(parts, widths, strict=True))
        lines.append(f"  {rank:>4} {sum(counts.values()):>7} {words:24} {numbers}")
    return "\n".join(lines)
