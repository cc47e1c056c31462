"""The layout of a job: its parallel axes, and how its ranks share one global batch."""

from __future__ import annotations

from dataclasses import dataclass

from llama_ds.config.numbers import near_divisors, near_multiples
from llama_ds.config.row_stages import stage_runs, stages_key
from llama_ds.config.schema import ParallelConfig, RunConfig
from llama_ds.errors import UserError, listed
from llama_ds.layout.axes import Axes
from llama_ds.layout.vocab_parts import fits
from llama_ds.schedules.schedule import NAMES as SCHEDULES
from llama_ds.schedules.schedule import obstacle


@dataclass(frozen=True)
class Layout(Axes):
    """Parallel axes and micro-batches: global_batch = dp * micro_batch * accumulation."""

    micro_batch: int = 1  # rows per forward pass
    accumulation: int = 1  # micro-batches per optimizer step

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step."""
        return self.dp * self.micro_batch * self.accumulation

    def as_data(self) -> dict[str, int]:
        """Return all sizes by name, as checkpoints record them."""
        batch = {name: getattr(self, name) for name in ("micro_batch", "accumulation", "global_batch")}
        return {"world": self.world, **self.named, **batch}


def model_axes(parallel: ParallelConfig) -> Axes:
    """Return the axes of one model replica, as the run file sizes them; dp follows from the world size."""
    return Axes(pp=parallel.pp, cp=parallel.cp, tp=parallel.tp)


def resolve_layout(run: RunConfig, world: int) -> Layout:
    """Derive dp and the accumulation steps of `run` from the world size; check those of all its stages.

    Raises:
        UserError: A size does not divide; the message lists sizes that do.
    """
    for stage in stage_runs(run) if stages_key(run) else ():
        try:
            layout = _resolve(stage, world)
            if run.data.stages:
                _check_evaluation(stage, layout)
        except UserError as error:
            what = f"rows of {stage.data.seq_len}" if run.data.stages else f"{stage.training.global_batch} rows"
            raise UserError(f"{error} (in the stage of {stages_key(run)} with {what})") from None
    return _resolve(run, world)


def _check_evaluation(run: RunConfig, layout: Layout) -> None:
    """Refuse the validation rows of a later stage now: without stages, the start of the run does."""
    unit = layout.dp * layout.micro_batch
    if run.evaluation.rows % unit:
        near = near_multiples(unit, run.evaluation.rows, 2)
        raise UserError(
            f"{run.path}: evaluation.rows = {run.evaluation.rows} is not a multiple of dp {layout.dp} * micro_batch "
            f"{layout.micro_batch} = {unit}; use {listed(near)}"
        )


def _resolve(run: RunConfig, world: int) -> Layout:
    source, axes = run.path, model_axes(run.parallel)
    replica = axes.replica
    if world < 1 or world % replica:
        near = near_multiples(replica, world, 3)
        keys = [f"parallel.{axis}" for axis in axes.replica_sizes]
        product = " * ".join(f"parallel.{axis} {size}" for axis, size in axes.replica_sizes.items())
        raise UserError(
            f"{source}: world size {world} is not a multiple of {product} = {replica}; "
            f"start {listed(near)} ranks, or change {listed(keys)}"
        )
    dp = world // replica
    batch, micro = run.training.global_batch, run.parallel.micro_batch
    if batch % dp:
        near = near_multiples(dp, batch, 2)
        product = " * ".join(f"{axis} {size}" for axis, size in axes.replica_sizes.items())
        raise UserError(
            f"{source}: training.global_batch = {batch} is not a multiple of "
            f"dp {dp} = world {world} / ({product}); use {listed(near)}"
        )
    if (batch // dp) % micro:
        raise UserError(
            f"{source}: parallel.micro_batch = {micro} does not divide {batch} / dp {dp} = {batch // dp}; "
            f"use {listed(near_divisors(batch // dp, micro))}"
        )
    _check_vocabulary(run)
    _check_neighbours(run, dp * axes.cp)
    _check_schedule(run, batch // dp // micro)
    _check_profile_ranks(run, world)
    sizes = axes.sizes._asdict() | {"dp": dp}
    return Layout(**sizes, micro_batch=micro, accumulation=batch // dp // micro)


def _check_vocabulary(run: RunConfig) -> None:
    rows, tp = run.model.vocab_size, run.parallel.tp
    if not fits(rows, tp):
        possible = [size for size in range(1, tp) if fits(rows, size)]
        raise UserError(
            f"{run.path}: parallel.tp = {tp} leaves a rank without rows of model.vocab_size = {rows}; "
            f"use {listed(possible)}"
        )


def _check_neighbours(run: RunConfig, ranks: int) -> None:
    neighbours = run.parallel.gradient_neighbours
    if ranks % neighbours:
        raise UserError(
            f"{run.path}: parallel.gradient_neighbours = {neighbours} does not divide dp * cp = {ranks}; "
            f"use {listed(near_divisors(ranks, neighbours))}"
        )


def _check_schedule(run: RunConfig, micro_batches: int) -> None:
    parallel = run.parallel
    if parallel.pp == 1 or parallel.schedule not in SCHEDULES:
        return
    reason = obstacle(
        parallel.schedule,
        parallel.pp,
        micro_batches,
        parallel.virtual_stages,
        parallel.extra_warmup,
        parallel.pass_times,
    )
    if reason:
        raise UserError(
            f"{run.path}: parallel.schedule = {parallel.schedule}: {reason} "
            "(micro-batches are training.global_batch / (dp * parallel.micro_batch))"
        )


def _check_profile_ranks(run: RunConfig, world: int) -> None:
    beyond = [rank for rank in run.logging.profile_ranks if not 0 <= rank < world]
    if beyond:
        raise UserError(
            f"{run.path}: logging.profile_ranks: {beyond[0]} is not one of the {world} ranks; use 0 to {world - 1}"
        )
