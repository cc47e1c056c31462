"""Worker process of a test: for each line of JSON (a Trial) it forks the ranks of a run that saves.

It answers with a line of JSON (an Outcome). Forking is cheap because torch is loaded already and there is one thread.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from commit_contents import LARGE, SMALL, THREE, Rank, ranks, save
from commit_points import Points

from llama_ds.checkpoint import store
from llama_ds.checkpoint.attempt import SaveAttempt
from llama_ds.checkpoint.manifest import DESCRIPTION

HANG_S = 120.0  # timeout after which a trial counts as hung


@dataclass(frozen=True)
class Trial:
    """A run that saves `steps` one after the other, and may be killed."""

    folder: str
    life: int
    steps: list[int]
    tokenizer: str = ""
    keep: tuple[int, int] = (0, 0)
    large: bool = False
    watch: bool = False  # report the operations of all ranks in the folder during the last step
    victim: int = -1  # the rank that is killed in the last step
    point: str | None = None  # the point at which it is killed
    leave: bool = False  # True: kill the other ranks once they cannot proceed; False: at once
    kill_after_s: float | None = None  # kill all ranks this long after the first commit

    @property
    def attempt(self) -> SaveAttempt:
        """The run's attempt. Its id is the life, so that points have the same names in every trial."""
        return SaveAttempt(self.folder, f"{self.life:016x}")


@dataclass
class Outcome:
    """The result of a trial."""

    committed: list[int] = field(default_factory=list)  # the steps that rank 0 reported as committed
    ends: list[int] = field(default_factory=list)  # each rank's exit status, or minus its signal
    points: list[tuple[int, int, str]] = field(default_factory=list)  # (time in ns, rank, point)
    hung: bool = False


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(ranks(folder), 1, 1)  # load the modules that torch imports at its first save
    gc.collect()
    gc.freeze()  # a collection in a forked rank would copy the pages of all objects
    for line in sys.stdin:
        outcome = perform(Trial(**json.loads(line)))
        print(json.dumps(asdict(outcome)), flush=True)


def perform(trial: Trial) -> Outcome:
    """Run a trial to its end."""
    outcome = Outcome(ends=[0] * len(THREE))
    trial.attempt.begin()
    together = multiprocessing.get_context("fork").Barrier(len(THREE))
    living: dict[int, int] = {}  # process ids
    at_rest: set[int] = set()  # ranks that have written the last step; len(THREE) stands for its commit by rank 0
    with selectors.DefaultSelector() as selector:
        for rank in range(len(THREE)):
            ours, theirs = os.pipe()
            living[rank] = os.fork()
            if not living[rank]:
                run_rank(trial, rank, together, theirs)
            os.close(theirs)
            selector.register(os.fdopen(ours, "rb", 0), selectors.EVENT_READ, rank)
        deadline, begun = time.monotonic() + HANG_S, False
        while living:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready or (begun and time.monotonic() >= deadline):  # also while ranks go on reporting
                outcome.hung = not begun
                kill(living)
                deadline = time.monotonic() + HANG_S
            for entry, _ in ready:
                rank, text = entry.data, entry.fileobj.readline()  # type: ignore[union-attr]
                if not text:
                    selector.unregister(entry.fileobj)
                    entry.fileobj.close()  # type: ignore[union-attr]
                    outcome.ends[rank] = os.waitstatus_to_exitcode(os.waitpid(living.pop(rank), 0)[1])
                    if outcome.ends[rank] and not trial.leave:
                        kill(living)
                else:
                    hear(outcome, at_rest, rank, json.loads(text), trial.steps[-1])
            if outcome.committed and not begun and trial.kill_after_s is not None:
                deadline, begun = time.monotonic() + trial.kill_after_s, True
            if trial.leave and trial.victim not in living and at_rest >= awaited(trial, set(living)):
                kill(living)
    if not any(outcome.ends):
        trial.attempt.end()
    return outcome


def hear(outcome: Outcome, at_rest: set[int], rank: int, news: list[Any], last: int) -> None:
    """Process a message of a rank."""
    what, value = news[0], news[1]
    if what == "point":
        outcome.points.append((news[2], rank, value))
    elif what == "committed":
        outcome.committed.append(value)
    if (what, value) in (("written", last), ("committed", last)):
        at_rest.add(rank if what == "written" else len(THREE))


def awaited(trial: Trial, living: set[int]) -> set[int]:
    """Return the entries of `at_rest` to wait for; then the remaining ranks cannot proceed."""
    tag = os.path.join(trial.folder, store.tag_of(trial.steps[-1]))
    unfinished = trial.attempt.partial(trial.steps[-1])
    record = os.path.join(unfinished, f"rank_{trial.victim:05d}.json")
    # In the order of their creation, because rank 0 may create them at this moment.
    complete = any(os.path.exists(p) for p in (record, os.path.join(unfinished, DESCRIPTION)))
    complete = complete or (not os.path.exists(unfinished) and os.path.exists(tag))
    return living | ({len(THREE)} if 0 in living and complete else set())


def kill(living: dict[int, int]) -> None:
    """Kill all ranks in random order. `perform` reaps each one when its pipe closes."""
    for process in random.sample(list(living.values()), len(living)):
        os.kill(process, signal.SIGKILL)


def run_rank(trial: Trial, rank: int, together: Any, pipe: int) -> None:
    """Run a rank in this process, and exit."""
    status = 1
    try:
        write = os.write  # the original, which `Points` does not watch

        def report(*news: Any) -> None:
            write(pipe, json.dumps(news).encode() + b"\n")

        save_steps(trial, rank, together, report)
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def save_steps(trial: Trial, rank: int, together: Any, report: Callable[..., None]) -> None:
    """Save all steps, with a barrier after each."""
    keep = store.Retention(*trial.keep)
    run = Rank(trial.attempt, rank, LARGE if trial.large else SMALL, THREE, trial.tokenizer, keep)
    for step in trial.steps:
        if step == trial.steps[-1] and (trial.watch or trial.victim == rank):
            log = partial(report, "point") if trial.watch else None
            Points(trial.folder, log, trial.point if trial.victim == rank else None)
        run.start(trial.life, step)
        if error := run.writer.wait_written():
            raise error
        report("written", step)
        if error := run.writer.wait_committed():
            raise error
        if rank == 0:
            report("committed", step)
        together.wait()


if __name__ == "__main__":
    main()
