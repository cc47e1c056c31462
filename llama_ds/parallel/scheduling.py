"""The pipeline schedule of a run on a layout."""

from __future__ import annotations

from llama_ds.config.layout import Layout
from llama_ds.config.rules import STOCK_ENGINE
from llama_ds.config.schema import RunConfig
from llama_ds.schedules.schedule import Schedule


def schedule_of(run: RunConfig, layout: Layout) -> Schedule:
    """Return the run's schedule; DeepSpeed's own engine runs 1F1B."""
    name = "1f1b" if layout.pp == 1 or run.parallel.schedule == STOCK_ENGINE else run.parallel.schedule
    return Schedule(name, layout.pp, layout.accumulation, run.parallel.virtual_stages)
