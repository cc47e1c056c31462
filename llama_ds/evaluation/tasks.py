"""Multiple-choice tasks: their examples, and the requests made of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_ds.evaluation.requests import ScoringRequest

ANSWER = "Answer:"  # context of the normalization of Brown et al. 2020


@dataclass(frozen=True)
class Example:
    """A question with its choices: each is a completion of its context; texts. `gold` is the index of the right one."""

    contexts: tuple[str, ...]
    completions: tuple[str, ...]
    gold: int
    group: str = ""  # examples shown before a question are of its group

    def __post_init__(self) -> None:
        if not 0 <= self.gold < len(self.completions):  # as where a data set hides the labels of its test split
            raise ValueError(f"its label names choice {self.gold} of 0 to {len(self.completions) - 1}")

    @property
    def solved(self) -> str:
        """The text with the right completion, shown before other questions."""
        return f"{self.contexts[self.gold]} {self.completions[self.gold]}"


@dataclass(frozen=True)
class Task:
    """A benchmark. `version` changes with everything that changes its numbers."""

    name: str
    version: int
    example: Callable[[Mapping[str, Any]], Example]  # reads one line of the data
    split: str = "validation"
    shot_split: str = "train"  # the split from which shown examples are taken
    shots: int = 0
    normalization: str = "characters"  # one of NORMALIZATIONS, the paper's
    dataset: str = ""  # repository of the data on the Hugging Face hub; empty: the examples are made from a seed
    subset: str = "default"
    heading: Callable[[str], str] = lambda group: ""  # text above the shown examples of a group


def chosen(task: Task, shown: Sequence[Example], example: Example) -> list[ScoringRequest]:
    """Return the requests of an example, one for each choice, then those of its normalization.

    `shown` are the solved examples before it.
    """
    before = task.heading(example.group) + "".join(f"{one.solved}\n\n" for one in shown)
    pairs = list(zip(example.contexts, example.completions, strict=True))
    requests = [ScoringRequest(before + context, f" {completion}") for context, completion in pairs]
    if task.normalization == "answer":
        requests += [ScoringRequest(ANSWER, f" {completion}") for _, completion in pairs]
    return requests


def request_count(task: Task, example: Example) -> int:
    """Return the number of requests of `chosen`."""
    return len(example.completions) * (2 if task.normalization == "answer" else 1)


def first_of_groups(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """Return `limit` examples in their order: the first ones of each group, from all groups about as many."""
    ranks: Counter[str] = Counter()
    places = []
    for number, example in enumerate(examples):
        places.append((ranks[example.group], number))
        ranks[example.group] += 1
    return [examples[number] for number in sorted(number for _, number in sorted(places)[:limit])]


def shown_examples(pool: Sequence[Example], task: Task, shots: int, example: Example) -> list[Example]:
    """Return the `shots` examples before a question: the first ones of its group, or the same draw for all."""
    if example.group:
        return [one for one in pool if one.group == example.group][:shots]
    return random.Random(f"{task.name} {task.version}").sample(pool, shots) if shots else []
