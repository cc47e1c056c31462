"""The pipeline schedule of a run on a layout, and a rank's position in it."""

from __future__ import annotations

from typing import Any

from llama_ds.config.schema import RunConfig
from llama_ds.config.section_rules import STOCK_ENGINE
from llama_ds.layout.layout import Layout
from llama_ds.schedules.schedule import Schedule


def schedule_of(run: RunConfig, layout: Layout) -> Schedule:
    """Return the run's schedule; DeepSpeed's own pipeline engine runs 1F1B."""
    parallel = run.parallel
    if layout.pp == 1 or parallel.schedule == STOCK_ENGINE:
        return Schedule("1f1b", layout.pp, layout.accumulation)
    return Schedule(
        parallel.schedule,
        layout.pp,
        layout.accumulation,
        parallel.virtual_stages,
        parallel.extra_warmup,
        parallel.pass_times,
        parallel.joint_weight_gradients,
    )


def describe_trace(run: RunConfig, layout: Layout, rank: int) -> dict[str, Any]:
    """Return the metadata that a rank's trace needs: schedule, sizes and coordinates."""
    schedule = schedule_of(run, layout)
    return {
        "world": layout.world,
        "engine": run.parallel.schedule,
        "schedule": schedule.name,
        "pp": layout.pp,
        "virtual_stages": schedule.chunks,
        "extra_warmup": schedule.extra_warmup,
        "pass_times": schedule.pass_times,
        "joint": schedule.joint,
        "micro_batches": layout.accumulation,
        **{f"{axis}_rank": at for axis, at in layout.coords(rank).named.items()},
    }
