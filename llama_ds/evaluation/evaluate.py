"""Tasks on a scorer: accuracies with standard errors, in a journal from which a killed evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llama_ds.errors import UserError
from llama_ds.evaluation.scoring import Scorer
from llama_ds.evaluation.suite import read_examples
from llama_ds.evaluation.tasks import (
    NORMALIZATIONS,
    Example,
    Task,
    choice_scores,
    chosen,
    first_of_groups,
    probability,
    request_count,
    shown_examples,
)

FORMAT = 2  # version of a journal's lines
BLOCK = 128  # examples that are scored together; a killed evaluation repeats at most so many


@dataclass(frozen=True)
class ExampleOutcome:
    """One example: whether the right completion was chosen by each normalization, and the share that it got."""

    correct: dict[str, bool]
    probability: float
    truncated: int = 0  # requests whose contexts lost tokens on the left


@dataclass(frozen=True)
class TaskResult:
    """The result of a task."""

    task: str
    version: int
    shots: int
    examples: int
    accuracy: float  # by `normalization`, the paper's
    stderr: float  # standard error of the accuracy; 0 for a single example
    probability: float  # mean share of the right choice among the choices
    normalization: str = "plain"
    accuracies: dict[str, float] = field(default_factory=dict)  # by each normalization that was computed
    truncated_requests: int = 0  # number of requests whose contexts lost tokens on the left


@dataclass(frozen=True)
class Work:
    """A task with the examples of an evaluation."""

    task: Task
    shots: int
    examples: list[Example]
    shown: list[Example]

    @property
    def requests(self) -> int:
        """Number of requests of all examples."""
        return sum(request_count(self.task, example) for example in self.examples)


def prepare(tasks: Sequence[Task], data: str, shots: int | None = None, limit: int | None = None) -> list[Work]:
    """Read the examples of all tasks; `shots` None: as many as in the paper.

    `limit` takes the first examples of each task, of one with subjects about as many of each.

    Raises:
        UserError: data is missing, or has fewer examples to show than asked for, in all or for a subject.
    """
    found = []
    for task in tasks:
        count = task.shots if shots is None else shots
        shown = read_examples(data, task, shown=True) if count else []
        examples = first_of_groups(read_examples(data, task), limit)
        _check_shown("" if shots is None else f"command line: --shots {shots}: ", task, count, shown, examples)
        found.append(Work(task, count, examples, shown))
    return found


def _check_shown(place: str, task: Task, count: int, shown: Sequence[Example], examples: Sequence[Example]) -> None:
    """Check that every question has `count` examples of its group to show; `place` is where the user set it."""
    there = Counter(one.group for one in shown)
    for group in dict.fromkeys(one.group for one in examples):
        if there[group] < count:
            name = f"{task.name}, subject {group}," if group else task.name
            raise UserError(
                f"{place}{name} has {there[group]} examples to show before a question, fewer than {count}; show fewer, "
                "or fetch its data again"
            )


class Journal:
    """The outcomes so far, in a file of JSON lines; the first line says of what they are."""

    def __init__(self, path: str | None, subject: dict[str, Any]) -> None:
        """Read what an earlier evaluation of the same `subject` left; None: keep nothing.

        Raises:
            UserError: the file belongs to another evaluation.
        """
        self.path = path
        self._done: dict[tuple[str, int], ExampleOutcome] = {}
        if path is None:
            return
        lines = _complete_lines(path)
        if lines and lines[0] != subject:
            raise UserError(f"{path}: holds results of {lines[0]}, not of {subject}; name another file with --results")
        if lines:
            _cut_last(path)
        self._done = {(line.pop("task"), line.pop("example")): ExampleOutcome(**line) for line in lines[1:]}
        if not lines:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.write(json.dumps(subject) + "\n")

    @property
    def done_before(self) -> int:
        """Number of examples that an earlier evaluation has scored."""
        return len(self._done)

    def known(self, work: Work) -> dict[int, ExampleOutcome]:
        """Return the outcomes of a task's examples by number."""
        key = _key(work)
        return {n: self._done[key, n] for n in range(len(work.examples)) if (key, n) in self._done}

    def add(self, work: Work, outcomes: dict[int, ExampleOutcome]) -> None:
        """Append outcomes to the file."""
        if self.path is None:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            for number, one in outcomes.items():
                file.write(json.dumps({"task": _key(work), "example": number, **asdict(one)}) + "\n")


def _key(work: Work) -> str:
    """Return what an outcome depends on beside the model: the task and its data, so that other data is scored anew."""
    digest = hashlib.sha256(repr((work.shown, work.examples)).encode()).hexdigest()[:16]
    return f"{work.task.name} v{work.task.version} shots {work.shots} data {digest}"


def _complete_lines(path: str) -> list[dict[str, Any]]:
    """Return the lines of a journal; a last line without its end is one that a kill cut."""
    if not os.path.exists(path) or not os.path.getsize(path):
        return []
    with open(path, "rb") as file:
        content = file.read()
    try:
        lines = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    except ValueError:
        lines = []
    if not lines or not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path}: is no journal of an evaluation; name another file with --results")
    return lines


def _cut_last(path: str) -> None:
    """Remove a last line without its end from a journal."""
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def evaluate(
    scorer: Scorer,
    work: Work,
    journal: Journal | None = None,
    before_block: Callable[[], object] = lambda: None,
    tick: Callable[[int], object] = lambda requests: None,
) -> TaskResult:
    """Score a task block by block and return its result. Collective under an engine; a journal is for one process.

    `tick` is called with the number of requests just done, also with those of an earlier evaluation.
    """
    found = journal.known(work) if journal else {}
    tick(sum(request_count(work.task, work.examples[number]) for number in found))
    for start in range(0, len(work.examples), BLOCK):
        block = [n for n in range(start, min(start + BLOCK, len(work.examples))) if n not in found]
        if not block:
            continue
        before_block()
        outcomes = dict(zip(block, _outcomes(scorer, work, [work.examples[n] for n in block], tick), strict=True))
        found |= outcomes
        if journal:
            journal.add(work, outcomes)
    return summary(work, list(found.values()))


def _outcomes(
    scorer: Scorer, work: Work, examples: Sequence[Example], tick: Callable[[int], object]
) -> list[ExampleOutcome]:
    task = work.task
    requests = [chosen(task, shown_examples(work.shown, task, work.shots, one), one) for one in examples]
    scores = iter(scorer.log_likelihoods([request for some in requests for request in some], tick))
    found = []
    for example, some in zip(examples, requests, strict=True):
        own = [next(scores) for _ in some]
        choices = choice_scores(example, [score.log_likelihood for score in own])
        correct = {name: values.index(max(values)) == example.gold for name, values in choices.items()}
        share = probability(choices[task.normalization], example.gold)
        found.append(ExampleOutcome(correct, share, sum(score.truncated for score in own)))
    return found


def summary(work: Work, outcomes: Sequence[ExampleOutcome]) -> TaskResult:
    """Return accuracies, the standard error of the task's own, and the mean share of the right choice."""
    task, count = work.task, len(outcomes)
    accuracies = {name: sum(one.correct[name] for one in outcomes) / count for name in outcomes[0].correct}
    accuracy = accuracies[task.normalization]
    share = sum(one.probability for one in outcomes) / count
    return TaskResult(
        task.name, task.version, work.shots, count, accuracy, standard_error(accuracy, count), share,
        task.normalization, accuracies, sum(one.truncated for one in outcomes),
    )  # fmt: skip


def standard_error(accuracy: float, count: int) -> float:
    """Return the standard error of a mean of `count` values that are 0 or 1."""
    return math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else 0.0


def table(results: Sequence[TaskResult]) -> str:
    """Return results as a table, with accuracies in percent by each normalization; a star marks the task's own."""
    head = "".join(f"  {name:>13}" for name in NORMALIZATIONS)
    lines = [f"{'task':16} {'version':>7} {'shots':>5} {'examples':>8}{head}  {'share':>5}"]
    for one in results:
        shown = "".join(f"  {_percent(one, name):>13}" for name in NORMALIZATIONS)
        lines.append(f"{one.task:16} {one.version:7} {one.shots:5} {one.examples:8}{shown}  {one.probability:5.3f}")
    return "\n".join(lines)


def _percent(result: TaskResult, normalization: str) -> str:
    accuracy = result.accuracies.get(normalization)
    if accuracy is None:
        return "-"
    mark = "*" if normalization == result.normalization else ""
    return f"{mark}{100 * accuracy:.1f} ± {100 * standard_error(accuracy, result.examples):.1f}"
