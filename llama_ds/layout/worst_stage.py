"""The stage of a run whose fullest rank needs the most memory."""

from __future__ import annotations

from llama_ds.config.row_stages import stage_runs
from llama_ds.config.schema import RunConfig
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.layout.rank_memory import rank_memory
from llama_ds.layout.recompute import stage_policies


def worst_stage(run: RunConfig, world: int, element_bytes: int) -> RunConfig:
    """Return the run as its stage with the most memory, the longest of several, trains it.

    `recompute: auto` must be resolved.

    Raises:
        UserError: a stage has no layout on `world` ranks, or exceeds its budget of activation memory.
    """
    stages = stage_runs(run)
    if len(stages) == 1:
        return stages[0]
    return max(reversed(stages), key=lambda stage: peak_bytes(stage, resolve_layout(stage, world), element_bytes))


def peak_bytes(run: RunConfig, layout: Layout, element_bytes: int) -> int:
    """Return the most bytes that the fullest rank holds at a time, all that `rank_memory` counts and activations."""
    placement, stages = schedule_of(run, layout).placement, stage_policies(run, layout, element_bytes)
    return max(
        held.peak(sum(stages[placement.stage(rank, chunk)].saved_bytes for chunk in range(placement.chunks)))
        for rank, held in enumerate(rank_memory(run, layout, element_bytes))
    )
