"""Started by a test: forks the ranks of a run that saves, one run for each line of JSON (a Trial) that it is given.

Answers each with a line of JSON (an Outcome). It has torch in memory and one thread, so that a trial costs little.
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

PATIENCE_S = 120.0  # then a trial counts as hung


@dataclass(frozen=True)
class Trial:
    """A run: it saves `steps` one after the other, and may die on the way."""

    folder: str
    life: int
    steps: list[int]
    tokenizer: str = ""
    keep: tuple[int, int] = (0, 0)
    large: bool = False
    watch: bool = False  # what the ranks do in the folder while they save the last step
    victim: int = -1  # the rank that dies in the last step
    point: str | None = None  # at which it does
    leave: bool = False  # the others until they can do no more; else they die as soon as it is dead
    kill_after_s: float | None = None  # all ranks, counted from the first commit

    @property
    def attempt(self) -> SaveAttempt:
        """The run's attempt. Its id says which life it is, so that points have the same names each time."""
        return SaveAttempt(self.folder, f"{self.life:016x}")


@dataclass
class Outcome:
    """What came of it."""

    committed: list[int] = field(default_factory=list)  # the steps of which rank 0 knew that they were there
    ends: list[int] = field(default_factory=list)  # how each rank ended: exit status, or minus the signal
    points: list[tuple[int, int, str]] = field(default_factory=list)  # when (ns), rank, what
    hung: bool = False


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(ranks(folder), 1, 1)  # what torch imports only when it saves is in memory, too
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
    at_rest: set[int] = set()  # ranks that have written the last step, and 0 only when it is committed if it will be
    with selectors.DefaultSelector() as selector:
        for rank in range(len(THREE)):
            ours, theirs = os.pipe()
            living[rank] = os.fork()
            if not living[rank]:
                run_rank(trial, rank, together, theirs)
            os.close(theirs)
            selector.register(os.fdopen(ours, "rb", 0), selectors.EVENT_READ, rank)
        deadline, begun = time.monotonic() + PATIENCE_S, False
        while living:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                outcome.hung = not begun
                kill(living)
                deadline = time.monotonic() + PATIENCE_S
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
    """Take in what a rank says."""
    what, value = news[0], news[1]
    if what == "point":
        outcome.points.append((news[2], rank, value))
    elif what == "committed":
        outcome.committed.append(value)
    if (what, value) in (("written", last), ("committed", last)):
        at_rest.add(rank if what == "written" else len(THREE))


def awaited(trial: Trial, living: set[int]) -> set[int]:
    """Return what is to be heard of before the ranks that are left can do no more."""
    tag = os.path.join(trial.folder, store.tag_of(trial.steps[-1]))
    unfinished = trial.attempt.partial(trial.steps[-1])
    record = os.path.join(unfinished, f"rank_{trial.victim:05d}.json")
    # In the order in which they come into being: rank 0 may be at work just now.
    complete = any(os.path.exists(p) for p in (record, os.path.join(unfinished, DESCRIPTION)))
    complete = complete or (not os.path.exists(unfinished) and os.path.exists(tag))
    return living | ({len(THREE)} if 0 in living and complete else set())


def kill(living: dict[int, int]) -> None:
    """Kill all ranks at once, in any order. They are waited for where their pipes end."""
    for process in random.sample(list(living.values()), len(living)):
        os.kill(process, signal.SIGKILL)


def run_rank(trial: Trial, rank: int, together: Any, pipe: int) -> None:
    """Be a rank, and then be gone."""
    status = 1
    try:
        write = os.write  # not the one that is watched

        def say(*news: Any) -> None:
            write(pipe, json.dumps(news).encode() + b"\n")

        save_steps(trial, rank, together, say)
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def save_steps(trial: Trial, rank: int, together: Any, say: Callable[..., None]) -> None:
    """Save all steps, in step with the other ranks."""
    keep = store.Retention(*trial.keep)
    run = Rank(trial.attempt, rank, LARGE if trial.large else SMALL, THREE, trial.tokenizer, keep)
    for step in trial.steps:
        if step == trial.steps[-1] and (trial.watch or trial.victim == rank):
            log = partial(say, "point") if trial.watch else None
            Points(trial.folder, log, trial.point if trial.victim == rank else None)
        run.start(trial.life, step)
        if error := run.writer.wait_written():
            raise error
        say("written", step)
        if error := run.writer.wait_committed():
            raise error
        if rank == 0:
            say("committed", step)
        together.wait()


if __name__ == "__main__":
    main()
