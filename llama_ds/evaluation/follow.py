"""Evaluation beside a run: every new checkpoint as it appears, until the run has ended.

The results are lines of RUN/tasks.jsonl, as those of `evaluation.tasks` are lines of metrics.jsonl. That file is the
run's own: a second writer on another host could lose its lines, and a resumed run rewrites it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llama_ds.checkpoint import store
from llama_ds.checkpoint.manifest import describe
from llama_ds.errors import UserError
from llama_ds.evaluation.evaluate import TaskResult, metrics_of
from llama_ds.evaluation.one_process import saved_at
from llama_ds.job.run_lock import LAUNCHER, RANKS, living_holder
from llama_ds.log import logger

RESULTS, JOURNALS = "tasks.jsonl", "tasks"  # in the folder of the run: results, and the outcomes of each checkpoint
POLL_S = 10.0

T = TypeVar("T")
Evaluate = Callable[[str, str], dict[str, Any]]  # checkpoint, journal -> what `evaluate_folder` returns


class Once(Protocol):
    """Returns on every rank what its argument returns on the first, the only one that calls it."""

    def __call__(self, work: Callable[[], T], /) -> T: ...


class Follower:
    """The checkpoints of a run that wait for their evaluation, and the results so far."""

    def __init__(self, run_dir: str, names: str) -> None:
        """`names` says which evaluation it is: tasks, shots and all else that changes results.

        Raises:
            UserError: there is no such folder.
        """
        if not os.path.isdir(run_dir):
            raise UserError(f"{run_dir}: no such folder; give the folder of a run, runs/NAME")
        self.run_dir, self._names = run_dir, names
        self._folder = os.path.join(run_dir, "checkpoints")
        self._path = os.path.join(run_dir, RESULTS)
        lines = result_lines(self._path)
        self._done = {(one.get("step"), one.get("saved")) for one in lines if one.get("names") == names}

    def next(self) -> str | None:
        """Return the oldest checkpoint that has not been evaluated; None: there is none now."""
        for tag in reversed(store.tags(self._folder)):
            path = os.path.join(self._folder, tag)
            try:
                if (store.step_of(tag), saved_at(path)) not in self._done:
                    return path
            except OSError:  # the run has just removed it
                continue
        return None

    def journal(self, path: str) -> str:
        """Return the journal of a checkpoint, from which a killed evaluation goes on."""
        return os.path.join(self.run_dir, JOURNALS, f"{os.path.basename(path)}-{saved_at(path)}.jsonl")

    def add(self, path: str, found: dict[str, Any]) -> dict[str, Any]:
        """Write the results of a checkpoint; return the line."""
        step = store.step_of(os.path.basename(path))
        line: dict[str, Any] = {"step": step, "tasks_tokens": describe(path).tokens, "names": self._names}
        line |= {"saved": saved_at(path)} | metrics_of([TaskResult(**one) for one in found["tasks"]])
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._done.add((step, line["saved"]))
        return line

    def ended(self) -> bool:
        """Return whether no job trains the run any more. Call it before `next`, so that its last checkpoint counts.

        Raises:
            UserError: nobody trains it, and it has no checkpoint.
        """
        held = any(living_holder(self.run_dir, name, "", lambda text: None) for name in (RANKS, LAUNCHER))
        if not held and not store.tags(self._folder):
            raise UserError(
                f"{self.run_dir}: no job trains this run, and it has no checkpoint; start it first, with "
                "checkpoint.interval"
            )
        return not held


def follow(
    follower: Follower,
    evaluate: Evaluate,
    once: Once = lambda work: work(),
    tell: Callable[[dict[str, Any]], object] = lambda line: None,
    wait: Callable[[float], object] = time.sleep,
) -> list[dict[str, Any]]:
    """Evaluate every checkpoint until the run has ended; return the lines written. Collective under an engine.

    Args:
        once: as `Once`; without ranks it is called.
        tell: gets every line.
        wait: waits for so many seconds.
    """
    lines: list[dict[str, Any]] = []
    while True:
        ended = once(follower.ended)
        while path := once(follower.next):
            try:
                found = evaluate(path, once(partial(follower.journal, path)))
                line = once(partial(follower.add, path, found))
            except (UserError, OSError) as error:
                if once(partial(os.path.isdir, path)):
                    raise
                logger.warning("%s: the run has removed it before it was evaluated (%s)", path, error)
                continue
            lines.append(line)
            tell(line)
        if ended:
            return lines
        wait(POLL_S)


def result_lines(path: str) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines; damaged lines are left out, with a warning that counts them."""
    if not os.path.exists(path):
        return []
    found, damaged = [], 0
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        if not line.endswith("\n"):  # the last one may be being written
            continue
        try:
            found.append(json.loads(line))
        except ValueError:
            damaged += 1
    objects = [line for line in found if isinstance(line, dict)]
    if damaged := damaged + len(found) - len(objects):
        logger.warning("%s: %d damaged line%s left out", path, damaged, "s" if damaged > 1 else "")
    return objects
