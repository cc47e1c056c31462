"""The run that records steps of a run: the same training, in a folder of its own, which saves and evaluates nothing."""

from __future__ import annotations

import os
from pathlib import Path

from llama_ds.config.schema import RunConfig
from llama_ds.config.schema_operation import NO_BOARDS
from llama_ds.errors import UserError

DEFAULT_RANKS = "first,middle,last"


def recording_overrides(run: RunConfig, folder: str, warmup: int, steps: int, ranks: list[int]) -> list[str]:
    """Return the overrides with which `run` records `steps` steps after `warmup` into `folder`, and as many profiled.

    Raises:
        UserError: numbers that make no sense, or a run of fewer steps.
    """
    for name, value, least in (("--steps", steps, 1), ("--warmup", warmup, 0)):
        if value < least:
            raise UserError(f"command line: {name} {value} is fewer than {least}; use {least} or more")
    last = warmup + steps * (2 if ranks else 1)
    if run.training.steps < last:
        raise UserError(
            f"{run.path}: training.steps = {run.training.steps} is fewer than the {last} of --warmup {warmup}, --steps "
            f"{steps}{' and as many for the profiler' if ranks else ''}; record fewer, or add training.steps={last}"
        )
    where = Path(os.path.abspath(folder))
    return [
        f"output_dir={where.parent}",
        f"name={where.name}",
        f"logging.trace_step={warmup + 1}",
        f"logging.trace_steps={steps}",
        f"logging.profile_ranks={ranks}",
        "logging.interval=1",
        "logging.straggler_interval=0",
        *NO_BOARDS,
        f"checkpoint.stop_at={last}",
        "checkpoint.save=false",
        "checkpoint.resume=never",
        "checkpoint.start_from=''",
        "checkpoint.rewind_to=0",
        "evaluation.interval=0",
        "evaluation.rows=0",
    ]
