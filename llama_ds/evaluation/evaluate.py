"""Tasks on a scorer: accuracies with standard errors, in a journal from which a killed evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from llama_ds.atomic_files import overwrite
from llama_ds.errors import UserError
from llama_ds.evaluation.choice_scores import NORMALIZATIONS, PLAIN, choice_scores, chosen_is_right, probability
from llama_ds.evaluation.generated_outcomes import generated_scores
from llama_ds.evaluation.generation_tasks import ONE_SAMPLE, GenerationTask, Question, Samples
from llama_ds.evaluation.scoring import Scorer
from llama_ds.evaluation.suite import read_examples
from llama_ds.evaluation.tasks import Example, Task, chosen, first_of_groups, request_count, shown_examples

FORMAT = 3  # version of a journal's lines
BLOCK = 128  # examples that are scored together; a killed evaluation repeats at most so many


@dataclass(frozen=True)
class ExampleOutcome:
    """One example: whether the right completion was chosen by each normalization, and the share that it got."""

    correct: dict[str, float]  # 1 or 0, or an estimate of pass@k
    probability: float | None  # None: the model wrote its answer
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
    probability: float | None  # mean share of the right choice among the choices; None: answers are generated
    normalization: str = PLAIN
    accuracies: dict[str, float] = field(default_factory=dict)  # by each normalization that was computed
    truncated_requests: int = 0  # number of requests whose contexts lost tokens on the left
    metric: str = "accuracy"


@dataclass(frozen=True)
class Work:
    """A task with the examples of an evaluation."""

    task: Task
    shots: int
    examples: list[Example]
    shown: list[Example]
    samples: Samples = ONE_SAMPLE  # for a task whose answers are generated

    @property
    def requests(self) -> int:
        """Number of requests of all examples."""
        return sum(map(self.request_count, self.examples))

    def request_count(self, example: Example) -> int:
        """Return the number of requests of an example."""
        return self.samples.count if isinstance(self.task, GenerationTask) else request_count(self.task, example)


def prepare(
    tasks: Sequence[Task], data: str, shots: int | None = None, limit: int | None = None, samples: Samples = ONE_SAMPLE
) -> list[Work]:
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
        found.append(Work(task, count, examples, shown, samples))
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
            overwrite(path, json.dumps(subject) + "\n")

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
                file.write(json.dumps({"task": _key(work), "example": number, **asdict(one)}) + "\n")


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
    tick(sum(work.request_count(work.examples[number]) for number in found))
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
    if isinstance(task, GenerationTask):
        shown, questions = cast(list[Question], work.shown), cast(list[Question], examples)
        judged = generated_scores(scorer, task, work.shots, shown, questions, work.samples, tick)
        return [ExampleOutcome({PLAIN: score}, None, truncated) for score, truncated in judged]
    requests = [chosen(task, shown_examples(work.shown, task, work.shots, one), one) for one in examples]
    scores = iter(scorer.log_likelihoods([request for some in requests for request in some], tick))
    found = []
    for example, some in zip(examples, requests, strict=True):
        own = [next(scores) for _ in some]
        choices = choice_scores(example.completions, [score.log_likelihood for score in own])
        correct = {name: chosen_is_right(values, example.gold) for name, values in choices.items()}
        share = probability(choices[task.normalization], example.gold)
        found.append(ExampleOutcome(correct, share, sum(score.truncated for score in own)))
    return found


def summary(work: Work, outcomes: Sequence[ExampleOutcome]) -> TaskResult:
    """Return accuracies, the standard error of the task's own, and the mean share of the right choice."""
    task, count = work.task, len(outcomes)
    accuracies = {name: sum(one.correct[name] for one in outcomes) / count for name in outcomes[0].correct}
    shares = [one.probability for one in outcomes if one.probability is not None]
    return TaskResult(
        task=task.name,
        version=task.version,
        shots=work.shots,
        examples=count,
        accuracy=accuracies[task.normalization],
        stderr=standard_error([one.correct[task.normalization] for one in outcomes]),
        probability=sum(shares) / count if shares else None,
        normalization=task.normalization,
        accuracies=accuracies,
        truncated_requests=sum(one.truncated for one in outcomes),
        metric=task.metric(work.samples) if isinstance(task, GenerationTask) else "accuracy",
    )


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of values; 0 for a single one."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / len(values)  # p (1 - p) for values of 0 and 1
    return math.sqrt(spread / (len(values) - 1)) if len(values) > 1 else 0.0


def metrics_of(results: Sequence[TaskResult]) -> dict[str, float]:
    """Return results by the keys that metrics.jsonl and boards have for them.

    Accuracies by another normalization than the task's own are tasks_NORMALIZATION/NAME.
    """
    values: dict[str, float] = {}
    for one in results:
        values |= {f"tasks/{one.task}": one.accuracy, f"tasks_stderr/{one.task}": one.stderr}
        if one.probability is not None:
            values[f"tasks_share/{one.task}"] = one.probability
        if one.truncated_requests:
            values[f"tasks_truncated/{one.task}"] = one.truncated_requests
        others = {name: value for name, value in one.accuracies.items() if name != one.normalization}
        values |= {f"tasks_{name}/{one.task}": value for name, value in others.items()}
    return values


def in_words(results: Sequence[TaskResult]) -> str:
    """Return results in a line, in percent, with the number of truncated requests."""
    return ", ".join(
        f"{one.task} {100 * one.accuracy:.1f} ± {100 * one.stderr:.1f}"
        + (f" ({one.truncated_requests} requests truncated)" if one.truncated_requests else "")
        for one in results
    )


def digest_of(works: Sequence[Work]) -> str:
    """Return what results depend on beside the model, in 16 digits."""
    return hashlib.sha256(repr([_key(work) for work in works]).encode()).hexdigest()[:16]


def table(results: Sequence[TaskResult]) -> str:
    """Return results as a table, with accuracies in percent by each normalization; a star marks the task's own.

    If requests were truncated, a column counts them.
    """
    head = "".join(f"  {name:>13}" for name in NORMALIZATIONS)
    counts = any(one.truncated_requests for one in results)
    lines = [f"{'task':16} {'version':>7} {'shots':>5} {'examples':>8}{head}  {'share':>5}" + "  truncated" * counts]
    for one in results:
        shown = "".join(f"  {_percent(one, name):>13}" for name in NORMALIZATIONS)
        share = f"{'' if one.probability is None else f'{one.probability:5.3f}':5}"
        share += f"  {one.truncated_requests:9}" * counts
        name = one.task if one.metric == "accuracy" else f"{one.task} {one.metric}"
        lines.append(f"{name:16} {one.version:7} {one.shots:5} {one.examples:8}{shown}  {share}".rstrip())
    return "\n".join(lines)


def _percent(result: TaskResult, normalization: str) -> str:
    accuracy = result.accuracies.get(normalization)
    if accuracy is None:
        return "-"
    if normalization == result.normalization:
        return f"*{100 * accuracy:.1f} ± {100 * result.stderr:.1f}"
    stderr = math.sqrt(accuracy * (1 - accuracy) / (result.examples - 1)) if result.examples > 1 else 0.0
    return f"{100 * accuracy:.1f} ± {100 * stderr:.1f}"
