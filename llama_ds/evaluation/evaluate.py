"""Tasks on a scorer: accuracies with standard errors, in a journal from which a killed evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from llama_ds.errors import UserError
from llama_ds.evaluation.generated_outcomes import generated_scores
from llama_ds.evaluation.generation_tasks import ONE_SAMPLE, GenerationTask, Question, Samples
from llama_ds.evaluation.scoring import Scorer
from llama_ds.evaluation.suite import read_examples
from llama_ds.evaluation.tasks import Example, Task, choice_scores, chosen, probability, shown_examples

BLOCK = 128  # examples that are scored together; a killed evaluation repeats at most so many


@dataclass(frozen=True)
class ExampleOutcome:
    """One example: whether the model chose the right completion, and the share that it gave to it."""

    correct: float  # 1 or 0, or an estimate of pass@k
    probability: float | None  # None: the model wrote its answer


@dataclass(frozen=True)
class TaskResult:
    """The result of a task."""

    task: str
    version: int
    shots: int
    examples: int
    accuracy: float
    stderr: float  # standard error of the accuracy; 0 for a single example
    probability: float | None  # mean share of the right choice among the choices; None: answers are generated
    metric: str = "accuracy"


@dataclass(frozen=True)
class Work:
    """A task with the examples of an evaluation."""

    task: Task
    shots: int
    examples: list[Example]
    shown: list[Example]
    samples: Samples = ONE_SAMPLE  # of a task whose answers are generated


def prepare(
    tasks: Sequence[Task], data: str, shots: int | None = None, limit: int | None = None, samples: Samples = ONE_SAMPLE
) -> list[Work]:
    """Read the examples of all tasks, the first `limit` of each; `shots` None: as many as in the paper.

    Raises:
        UserError: data is missing, or has fewer examples to show than asked for.
    """
    found = []
    for task in tasks:
        count = task.shots if shots is None else shots
        shown = read_examples(data, task, shown=True) if count else []
        if len(shown) < count:
            raise UserError(f"command line: --shots {count}: {task.name} has {len(shown)} examples to show; use fewer")
        found.append(Work(task, count, read_examples(data, task)[:limit], shown, samples))
    return found


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
        self._done = {
            (line["task"], line["example"]): ExampleOutcome(line["correct"], line["probability"]) for line in lines[1:]
        }
        if not lines:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.write(json.dumps(subject) + "\n")

    def share(self, gather: Callable[[object], Sequence[Any]]) -> None:
        """Take over what the first rank has read, so that all ranks score the same. Collective."""
        self._done = gather(self._done)[0]

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
                line = {"task": _key(work), "example": number, "correct": one.correct, "probability": one.probability}
                file.write(json.dumps(line) + "\n")


def _key(work: Work) -> str:
    """Return what an outcome depends on beside the model: the task and its data, so that other data is scored anew."""
    digest = hashlib.sha256(repr((work.shown, work.examples)).encode()).hexdigest()[:16]
    samples = work.samples.words if isinstance(work.task, GenerationTask) else ""
    return f"{work.task.name} v{work.task.version} shots {work.shots}{samples} data {digest}"


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
    scorer: Scorer, work: Work, journal: Journal | None = None, before_block: Callable[[], object] = lambda: None
) -> TaskResult:
    """Score a task block by block and return its result. Collective under an engine; a journal is for one process."""
    found = journal.known(work) if journal else {}
    for start in range(0, len(work.examples), BLOCK):
        block = [n for n in range(start, min(start + BLOCK, len(work.examples))) if n not in found]
        if not block:
            continue
        before_block()
        outcomes = dict(zip(block, _outcomes(scorer, work, [work.examples[n] for n in block]), strict=True))
        found |= outcomes
        if journal:
            journal.add(work, outcomes)
    return summary(work, list(found.values()))


def _outcomes(scorer: Scorer, work: Work, examples: Sequence[Example]) -> list[ExampleOutcome]:
    task = work.task
    if isinstance(task, GenerationTask):
        shown, questions = cast(list[Question], work.shown), cast(list[Question], examples)
        judged = generated_scores(scorer, task, work.shots, shown, questions, work.samples)
        return [ExampleOutcome(score, None) for score in judged]
    requests = [chosen(task, shown_examples(work.shown, task, work.shots, one), one) for one in examples]
    scores = iter(scorer.log_likelihoods([request for some in requests for request in some]))
    found = []
    for example, some in zip(examples, requests, strict=True):
        choices = choice_scores(task, example, [next(scores).log_likelihood for _ in some])
        best = max(range(len(choices)), key=choices.__getitem__)
        found.append(ExampleOutcome(best == example.gold, probability(choices, example.gold)))
    return found


def summary(work: Work, outcomes: Sequence[ExampleOutcome]) -> TaskResult:
    """Return accuracy, the standard error of this mean, and the mean share of the right choice."""
    count = len(outcomes)
    accuracy = sum(one.correct for one in outcomes) / count
    spread = sum((one.correct - accuracy) ** 2 for one in outcomes) / count  # of 0 and 1: p (1 - p)
    stderr = math.sqrt(spread / (count - 1)) if count > 1 else 0.0
    shares = [one.probability for one in outcomes if one.probability is not None]
    share = sum(shares) / count if shares else None
    metric = work.task.metric(work.samples) if isinstance(work.task, GenerationTask) else "accuracy"
    return TaskResult(work.task.name, work.task.version, work.shots, count, accuracy, stderr, share, metric)


def metrics_of(results: Sequence[TaskResult]) -> dict[str, float]:
    """Return results by the keys that metrics.jsonl and boards have for them."""
    values: dict[str, float] = {}
    for one in results:
        values |= {f"tasks/{one.task}": one.accuracy, f"tasks_stderr/{one.task}": one.stderr}
        if one.probability is not None:
            values[f"tasks_share/{one.task}"] = one.probability
    return values


def in_words(results: Sequence[TaskResult]) -> str:
    """Return results in a line, in percent."""
    return ", ".join(f"{one.task} {100 * one.accuracy:.1f} ± {100 * one.stderr:.1f}" for one in results)


def digest_of(works: Sequence[Work]) -> str:
    """Return what results depend on beside the model, in 16 digits."""
    return hashlib.sha256(repr([_key(work) for work in works]).encode()).hexdigest()[:16]


def table(results: Sequence[TaskResult]) -> str:
    """Return results as a table; accuracies in percent."""
    lines = [f"{'task':16} {'version':>7} {'shots':>5} {'examples':>8}  {'accuracy':>13}  {'share':>5}"]
    for one in results:
        accuracy = f"{100 * one.accuracy:.1f} ± {100 * one.stderr:.1f}"
        share = "" if one.probability is None else f"{one.probability:5.3f}"
        name = one.task if one.metric == "accuracy" else f"{one.task} {one.metric}"
        lines.append(f"{name:16} {one.version:7} {one.shots:5} {one.examples:8}  {accuracy:>13}  {share:>5}".rstrip())
    return "\n".join(lines)
