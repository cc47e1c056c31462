"""The arithmetic of a layout: world size, pipeline, tensor and data parallelism, micro-batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.schedules.schedule import NAMES as SCHEDULES
from llama_ds.schedules.schedule import obstacle


@dataclass(frozen=True)
class Layout:
    """How `world` ranks share one global batch: world = pp * dp * tp, global_batch = dp * micro_batch * accumulation.

    Rank order is DeepSpeed's PipeModelDataParallelTopology: rank = (pp_rank * dp + dp_rank) * tp + tp_rank,
    so that the ranks of a tensor-parallel group are neighbours on one node.
    """

    world: int
    pp: int
    tp: int
    dp: int
    micro_batch: int  # rows per forward pass
    accumulation: int  # micro-batches per optimizer step
    global_batch: int  # rows per optimizer step

    def rank_at(self, pp_rank: int, dp_rank: int, tp_rank: int) -> int:
        """Return the global rank at a place."""
        return (pp_rank * self.dp + dp_rank) * self.tp + tp_rank

    def place_of(self, rank: int) -> tuple[int, int, int]:
        """Return (pp_rank, dp_rank, tp_rank) of a global rank."""
        rest, tp_rank = divmod(rank, self.tp)
        pp_rank, dp_rank = divmod(rest, self.dp)
        return pp_rank, dp_rank, tp_rank


def divisors(n: int) -> list[int]:
    """Return the divisors of `n` in increasing order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def resolve_layout(run: RunConfig, world: int) -> Layout:
    """Derive dp and the accumulation steps of `run` on `world` ranks.

    Raises:
        UserError: when a number does not divide; the message lists the numbers that would.
    """
    place, pp, tp = run.path, run.parallel.pp, run.parallel.tp
    if world % (pp * tp):
        fits = range(pp * tp, max(world, pp * tp) * 2 + 1, pp * tp)
        near = sorted(sorted(fits, key=lambda n: abs(n - world))[:3])
        raise UserError(
            f"{place}: world size {world} is not a multiple of parallel.pp {pp} * parallel.tp {tp} = {pp * tp}; "
            f"start {listed(near)} ranks, or change parallel.pp or parallel.tp"
        )
    dp = world // (pp * tp)
    batch, micro = run.training.global_batch, run.parallel.micro_batch
    if batch % dp:
        near = sorted(sorted(range(dp, batch + 2 * dp, dp), key=lambda n: abs(n - batch))[:2])
        raise UserError(
            f"{place}: training.global_batch = {batch} is not a multiple of "
            f"dp {dp} = world {world} / (pp {pp} * tp {tp}); use {listed(near)}"
        )
    if (batch // dp) % micro:
        raise UserError(
            f"{place}: parallel.micro_batch = {micro} does not divide {batch} / dp {dp} = {batch // dp}; "
            f"use {listed(divisors(batch // dp))}"
        )
    _check_schedule(run, batch // dp // micro)
    _check_profile_ranks(run, world)
    return Layout(world, pp, tp, dp, micro, batch // dp // micro, batch)


def _check_schedule(run: RunConfig, micro_batches: int) -> None:
    parallel = run.parallel
    if parallel.pp == 1 or parallel.schedule not in SCHEDULES:
        return
    reason = obstacle(parallel.schedule, parallel.pp, micro_batches, parallel.virtual_stages, parallel.extra_warmup)
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


def listed(choices: Iterable[object]) -> str:
    """Return the choices as words: "1, 2 or 4"."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
