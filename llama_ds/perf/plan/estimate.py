"""One run on one layout and machine: what it holds, how long a step takes, and where each number comes from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from llama_ds.config.deepspeed_json import deepspeed_config, training_dtype
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.layout.partition import decoder_layers, stage_boundaries
from llama_ds.layout.recompute import GIB, StagePolicies, stage_policies, with_device_memory
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import job_of, layers_by_policy
from llama_ds.perf.plan.memory import Memory, run_memory
from llama_ds.perf.plan.step import StepTime, step_time


@dataclass(frozen=True)
class Estimate:
    """A layout with what it costs."""

    run: RunConfig
    layout: Layout
    gpu: Hardware
    policies: tuple[StagePolicies, ...]
    memory: tuple[Memory, ...]  # of the pipeline's ranks
    step: StepTime

    @property
    def peak_bytes(self) -> float:
        return max(rank.total for rank in self.memory)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.gpu.memory_bytes

    @property
    def days(self) -> float:
        """Days that the whole run takes, without interruptions."""
        return self.run.training.steps * self.step.seconds / 86400


def with_partition(run: RunConfig) -> RunConfig:
    """Return the run with the layers of its stages written out: the balanced ones, where it names none."""
    counts = tuple(decoder_layers(stage_boundaries(run)))
    return replace(run, parallel=replace(run.parallel, partition=counts))


def filled(layout: Layout) -> Layout:
    """Return the layout with as few micro-batches as fill its pipeline: what ranks hold does not grow with more."""
    enough = 3 * layout.pp
    if layout.accumulation <= enough + layout.pp:
        return layout
    return replace(layout, accumulation=enough + layout.accumulation % layout.pp)


def held_by(run: RunConfig, layout: Layout, gpu: Hardware) -> tuple[tuple[StagePolicies, ...], tuple[Memory, ...]]:
    """Return the stages' policies and what the ranks hold.

    Raises:
        UserError: a recompute budget that cannot be kept.
    """
    enough = filled(layout)
    policies = tuple(stage_policies(run, enough, gpu.element_bytes))
    return policies, tuple(run_memory(run, enough, policies, gpu.memory_bytes, gpu.element_bytes))


def estimate(run: RunConfig, world: int, gpu: Hardware) -> Estimate:
    """Return what the run costs with its own layout.

    Args:
        world: GPUs in all.
        gpu: the kind of machine, such as `hardware.load("a100-80gb")`.

    Raises:
        UserError: a layout that the trainer would refuse, or a run in another dtype than the machine is described in.
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
    for section in ("offload_optimizer", "offload_param"):
        if run.deepspeed.get("zero_optimization", {}).get(section):
            raise UserError(
                f"{run.deepspeed_path}: zero_optimization.{section}: the planner does not know what host memory "
                "holds and what the way there costs; take it out to plan the rest"
            )
    run = with_device_memory(with_partition(run), gpu.memory_bytes)
    policies, memory = held_by(run, layout, gpu)
    return Estimate(run, layout, gpu, policies, memory, step_time(gpu, job_of(run, layout, policies, gpu.dtype)))


def as_data(found: Estimate) -> dict[str, Any]:
    """Return the estimate as plain data for JSON, in seconds, GiB and shares of 1."""
    step, parallel, layout = found.step, found.run.parallel, found.layout
    return {
        "gpu": found.gpu.name,
        "gpus": layout.world,
        "layout": {**layout.as_data(), "schedule": parallel.schedule, "virtual_stages": parallel.virtual_stages},
        "sequence_parallel": parallel.sequence_parallel,
        "extra_warmup": parallel.extra_warmup,
        "zero_stage": found.run.zero_stage,
        "recompute": [dict(counts) for counts in step.job.stages],
        "step_s": step.seconds,
        "tokens_per_s_per_gpu": step.tokens_per_second,
        "mfu": step.mfu(found.gpu),
        "days": found.days,
        "bubble": step.bubble,
        "pipeline_s": step.pipeline,
        "reduction_s": step.reduction,
        "optimizer_s": step.optimizer,
        "host_s": step.host,
        "fits": found.fits,
        "peak_memory_gib": found.peak_bytes / GIB,
        "memory_gib": [{name: value / GIB for name, value in asdict(rank).items()} for rank in found.memory],
    }


def report(found: Estimate) -> str:
    """Return the estimate for people."""
    step, layout, parallel = found.step, found.layout, found.run.parallel
    lines = [
        f"{found.run.name} on {layout.world:,} x {found.gpu.name}: {layout.words(' ')}, "
        f"{parallel.schedule if layout.pp > 1 else 'no pipeline'}"
        f"{f' with {parallel.virtual_stages} stages a rank' if parallel.virtual_stages > 1 else ''}"
        f"{f', extra warm-up {parallel.extra_warmup}' if parallel.extra_warmup else ''}, ZeRO-{found.run.zero_stage}",
        f"  batch          {layout.global_batch:,} rows of {found.run.data.seq_len:,} = dp {layout.dp} x micro-batch "
        f"{layout.micro_batch} x {layout.accumulation} micro-batches",
        f"  step           {step.seconds:.3f} s = pipeline {step.pipeline:.3f} + reduction {step.reduction:.3f} + "
        f"optimizer {step.optimizer:.3f} + host {step.host:.3f}",
        f"  bubble         {step.bubble:.1%} of the pipeline's time",
        f"  speed          {step.tokens_per_second:,.0f} tokens/s/GPU, MFU {step.mfu(found.gpu):.1%}, "
        f"{found.days:.1f} days for {found.run.training.tokens:.3g} tokens",
        f"  memory         {found.peak_bytes / GIB:.1f} of {found.gpu.memory_gib:.0f} GiB"
        f"{'' if found.fits else ': DOES NOT FIT'}",
        "",
        f"  {'rank':>4} {'layers':>7} {'recompute':24} {'weights':>8} {'grads':>7} {'optim':>7} {'activ':>7} "
        f"{'working':>8} {'margin':>7} {'GiB':>7}",
    ]
    place = step.job.plan(max(layout.accumulation, 2 * layout.pp)).place
    for rank, held in enumerate(found.memory):
        own = [step.job.stages[place.stage(rank, chunk)] for chunk in range(place.chunks)]
        counts = layers_by_policy(own)
        words = ", ".join(f"{number} {policy}" for policy, number in counts.items())
        parts = (held.weights, held.gradients, held.optimizer, held.activations, held.working, held.margin, held.total)
        numbers = " ".join(
            f"{value / GIB:{width}.1f}" for value, width in zip(parts, (8, 7, 7, 7, 8, 7, 7), strict=True)
        )
        lines.append(f"  {rank:>4} {sum(counts.values()):>7} {words:24} {numbers}")
    return "\n".join(lines)
