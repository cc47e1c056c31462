"""Runs the rungs of a ladder, one after another or side by side, and reads what they have measured."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from threading import Event

from llama_ds import shipped
from llama_ds.config.run_file import load_resolved
from llama_ds.errors import UserError
from llama_ds.experiments.ladder.plan import Rung, host_groups
from llama_ds.experiments.ladder.spec import Ladder
from llama_ds.experiments.records import METRICS, RUN_FILE, Curve, read_run
from llama_ds.job.devices import VISIBLE, visible_devices
from llama_ds.launch.hostfile import write_hostfile

# Runs a command with its output in a file ("": here) and with more variables, and returns its exit code.
Start = Callable[[list[str], str, Mapping[str, str]], int]
COMPARED = ("model", "data", "training", "optimizer", "seed")


@dataclass(frozen=True)
class Measured:
    """A finished rung."""

    rung: Rung
    loss: float  # validation loss after the last step, nats per token
    curve: Curve  # training loss
    tasks: Mapping[str, Curve]  # accuracies of benchmarks


def command(ladder: Ladder, run_file: str, hostfile: str) -> list[str]:
    """Return the command that trains one run file, on the hosts of `hostfile`, and resumes it."""
    if hostfile:
        tool = shipped.folder("tools") / "launch.py"
        return [sys.executable, str(tool), run_file, "--hostfile", hostfile, "--supervise"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ladder.ranks)]
    return [*torchrun, os.path.relpath(shipped.TRAIN), run_file]


@dataclass(frozen=True)
class Place:
    """Where a run is trained: the hosts of a hostfile, or a part of this machine."""

    hostfile: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)


def places(ladder: Ladder) -> list[Place]:
    """Return the places that train a run each at a time; write their hostfiles.

    Raises:
        UserError: CUDA_VISIBLE_DEVICES lists fewer devices than the runs need.
    """
    share = max(1, (os.cpu_count() or 1) // (ladder.ranks * ladder.at_once))
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(share))}
    found = []
    if ladder.hostfile:
        os.makedirs(f"{ladder.root}/hosts", exist_ok=True)
        for number, hosts in enumerate(host_groups(ladder), 1):
            found.append(Place(f"{ladder.root}/hosts/{number}", threads))
            write_hostfile(found[-1].hostfile, hosts)
        return found
    for number in range(ladder.at_once):
        slots = range(number * ladder.ranks, (number + 1) * ladder.ranks)
        devices = visible_devices({"here": slots}, "here", os.environ) if ladder.at_once > 1 else {}
        found.append(Place(variables=threads | ({VISIBLE: devices["here"]} if devices else {})))
    return found


def execute(
    ladder: Ladder, rungs: Sequence[Rung], paths: Sequence[str], start: Start, say: Callable[[str], None]
) -> None:
    """Train every rung that is not finished, one at a time in each place. `start` is called from threads.

    Raises:
        UserError: a run failed or ended before its last step. The same command goes on from there.
    """
    found = places(ladder)
    free: Queue[Place] = Queue()
    for place in found:
        free.put(place)
    failed = Event()  # after it no run is started

    def train(number: int, rung: Rung, path: str) -> str:
        """Train a rung; return what went wrong."""
        place = free.get()
        try:
            problem = "" if failed.is_set() else train_in(place, number, rung, path)
        except BaseException:
            failed.set()
            raise
        finally:
            free.put(place)
        if problem:
            failed.set()
        return problem

    def train_in(place: Place, number: int, rung: Rung, path: str) -> str:
        title = f"{rung.name} ({number} of {len(rungs)}): {rung.parameters:,} parameters"
        if measured(rung):
            say(f"{title}: finished before")
            return ""
        log = f"{ladder.root}/logs/{rung.name}.log" if len(found) > 1 else ""
        on = [f"on {place.hostfile}"] if place.hostfile else []
        say(
            f"{title}, {rung.run.training.tokens:,} tokens in {rung.run.training.steps:,} steps"
            + (f"; {', '.join([*on, f'output in {log}'])}" if log else "")
        )
        if code := start(command(ladder, path, place.hostfile), log, place.variables):
            return f"{rung.name}: training ended with exit code {code}; see its message; run again to go on"
        if not measured(rung):
            return f"{rung.name}: ended before step {rung.run.training.steps}; run again to go on"
        return ""

    pool = ThreadPoolExecutor(len(found))
    try:
        numbered = enumerate(zip(rungs, paths, strict=True), 1)
        started = [pool.submit(train, number, rung, path) for number, (rung, path) in numbered]
        problems = [problem for future in started if (problem := future.result())]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # whoever made `start` ends what still runs after an error
    if problems:
        raise UserError("; ".join(problems))


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
    tasks = {name.removeprefix("tasks/"): one for name, one in curves.items() if name.startswith("tasks/")}
    return Measured(rung, found_loss, Curve(steps, [last[step] for step in steps]), tasks)
