"""Tasks by name, and their examples from a local folder: evaluation itself never uses the network."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from llama_ds.errors import UserError, did_you_mean, listed
from llama_ds.evaluation.generation_tasks import CLOSED_BOOK, CODE, MATHEMATICS
from llama_ds.evaluation.miniature import MINIATURE, examples
from llama_ds.evaluation.paper_tasks import COMMON_SENSE, MMLU, PAPER, RACE
from llama_ds.evaluation.tasks import Example, Task

TASKS: dict[str, Task] = {task.name: task for task in (*MINIATURE, *PAPER, *CLOSED_BOOK, *MATHEMATICS, *CODE)}
GROUPS: dict[str, tuple[Task, ...]] = {
    "miniature": MINIATURE,
    "common_sense": COMMON_SENSE,
    "race": RACE,
    "closed_book": CLOSED_BOOK,
    "mathematics": MATHEMATICS,
    "code": CODE,
    "paper": (*COMMON_SENSE, *RACE, MMLU, *CLOSED_BOOK, *MATHEMATICS),  # code is run only where it is asked for by name
}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of names of tasks and groups, each once.

    Raises:
        UserError: a name is unknown.
    """
    found: dict[str, Task] = {}
    for name in names:
        if name not in TASKS and name not in GROUPS:
            known = [*GROUPS, *TASKS]
            raise UserError(f"task {name!r}: unknown{did_you_mean(name, known)}; there are {listed(known)}")
        found |= {task.name: task for task in GROUPS.get(name) or (TASKS[name],)}
    return list(found.values())


def split_file(data: str, task: Task, split: str) -> str:
    """Return the file of a split in the folder `data`: one JSON object with the data set's columns on each line."""
    return os.path.join(data, task.name, f"{split}.jsonl")


def read_examples(data: str, task: Task, shown: bool = False) -> list[Example]:
    """Return a task's examples, or those from which the ones before a question are taken.

    Raises:
        UserError: the data has not been fetched, or a line has other columns.
    """
    if not task.dataset:
        return examples(task.name, shown)
    split = task.shot_split if shown else task.split
    path = split_file(data, task, split)
    if not os.path.exists(path):
        raise UserError(
            f"{path}: missing; on a machine with a network, run tools/evaluate.py fetch {task.name} --data {data}, or "
            f"write split {split!r} of {task.dataset} ({task.subset}) there, one JSON object a line"
        )
    found = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                found.append(task.example(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise UserError(
                    f"{path}:{number}: not an example of {task.name} ({type(error).__name__}: {error}); fetch it again"
                ) from None
    if not found:
        raise UserError(f"{path}: has no examples; fetch it again")
    return found
