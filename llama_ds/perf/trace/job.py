"""The recording run: the same training in a separate folder, without checkpoints and evaluation."""

from __future__ import annotations

import os
from pathlib import Path

from llama_ds.config.schema import RunConfig
from llama_ds.config.schema_operation import NO_BOARDS
from llama_ds.errors import UserError

DEFAULT_RANKS = "first,middle,last"


def recording_overrides(run: RunConfig, folder: str, warmup: int, steps: int, ranks: list[int]) -> list[str]:
    """Return the overrides with which `run` records `steps` steps after `warmup` steps into `folder`.

    With `ranks`, it profiles these ranks for as many further steps.

    Raises:
        UserError: A number is out of range, or the run has too few steps.
    """
    for name, value, minimum in (("--steps", steps, 1), ("--warmup", warmup, 0)):
        if value < minimum:
            raise UserError(f"command line: {name} {value} is fewer than {minimum}; use {minimum} or more")
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
        "evaluation.tasks=[]",
    ]
