"""Runs the rungs of a ladder one after another, and reads what they have measured."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_ds import shipped
from llama_ds.config.run_file import load_resolved
from llama_ds.errors import UserError
from llama_ds.experiments.ladder.plan import Rung
from llama_ds.experiments.ladder.spec import Ladder
from llama_ds.experiments.records import METRICS, RUN_FILE, Curve, read_run

Start = Callable[[list[str]], int]  # runs a command to its end and returns its exit code
COMPARED = ("model", "data", "training", "optimizer", "seed")


@dataclass(frozen=True)
class Measured:
    """A finished rung."""

    rung: Rung
    loss: float  # validation loss after the last step, nats per token
    curve: Curve  # training loss


def command(ladder: Ladder, run_file: str) -> list[str]:
    """Return the command that trains one run file and resumes it from its newest checkpoint."""
    if ladder.hostfile:
        tool = shipped.folder("tools") / "launch.py"
        return [sys.executable, str(tool), run_file, "--hostfile", ladder.hostfile, "--supervise"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ladder.ranks)]
    return [*torchrun, os.path.relpath(shipped.TRAIN), run_file]


def execute(
    ladder: Ladder, rungs: Sequence[Rung], paths: Sequence[str], start: Start, say: Callable[[str], None]
) -> None:
    """Train every rung that is not finished; those of `predict` come last.

    Raises:
        UserError: a run failed or ended before its last step. The same command goes on from there.
    """
    for number, (rung, path) in enumerate(zip(rungs, paths, strict=True), 1):
        title = f"{rung.name} ({number} of {len(rungs)}): {rung.parameters:,} parameters"
        if measured(rung):
            say(f"{title}: finished before")
            continue
        say(f"{title}, {rung.run.training.tokens:,} tokens in {rung.run.training.steps:,} steps")
        code = start(command(ladder, path))
        if code:
            raise UserError(f"{rung.name}: training ended with exit code {code}; see its message; run again to go on")
        if not measured(rung):
            raise UserError(f"{rung.name}: ended before step {rung.run.training.steps}; run again to go on")


def measured(rung: Rung) -> Measured | None:
    """Return the results of a rung, None if it has not reached its last step.

    Raises:
        UserError: its folder holds another run.
    """
    folder = rung.run.run_dir
    if not Path(folder, METRICS).exists():
        return None
    if Path(folder, RUN_FILE).exists():
        found = load_resolved(f"{folder}/{RUN_FILE}")
        changed = [key for key in COMPARED if getattr(found, key) != getattr(rung.run, key)]
        if changed:
            raise UserError(f"{folder}: holds a run with another {changed[0]}; remove it or rename the ladder")
    curves = read_run(folder).curves
    ends = curves.get("val_loss", Curve((), ()))
    found_loss = dict(zip(ends.steps, ends.values, strict=True)).get(rung.run.training.steps)
    if found_loss is None:
        return None
    if not math.isfinite(found_loss):
        raise UserError(f"{folder}: its validation loss is {found_loss}; lower the learning rate of the ladder's base")
    loss = curves.get("loss", Curve((), ()))
    last = dict(zip(loss.steps, loss.values, strict=True))  # a step that was done again counts once
    steps = sorted(last)
    return Measured(rung, found_loss, Curve(steps, [last[step] for step in steps]))
