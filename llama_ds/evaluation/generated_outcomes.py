"""Outcomes of tasks in which the model writes its answers: prompts, samples, votes and programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llama_ds.errors import UserError
from llama_ds.evaluation.code_runs import all_pass
from llama_ds.evaluation.generated_answers import majority, pass_at
from llama_ds.evaluation.generation import GenerationRequest
from llama_ds.evaluation.generation_tasks import GenerationTask, Question, Samples
from llama_ds.evaluation.scoring import Scorer
from llama_ds.evaluation.tasks import Task, shown_examples


def check_leave(tasks: Sequence[Task], samples: Samples) -> None:
    """Check that programs may run if a task needs it.

    Raises:
        UserError: they may not.
    """
    if named := [task.name for task in tasks if isinstance(task, GenerationTask) and task.runs_code]:
        if samples.run_code:
            return
        raise UserError(
            f"task {named[0]}: runs programs that the model writes; allow it with tools/evaluate.py --run-code, on a "
            "machine that they cannot harm"
        )


def generated_scores(
    scorer: Scorer, task: GenerationTask, shots: int, shown: Sequence[Question], examples: Sequence[Question],
    samples: Samples, tick: Callable[[int], object] = lambda requests: None,
) -> list[tuple[float, int]]:  # fmt: skip
    """Return of each example its score, and how many of its requests were truncated. Collective.

    The score is 1 if the answer is right, else 0; or the estimate of pass@k.

    `tick` is called with the number of texts just generated.
    """
    rule = task.rule(samples)
    requests = [
        GenerationRequest(prompt(task, shots, shown, example), task.stops, task.max_tokens, rule, sample)
        for example in examples
        for sample in range(samples.count)
    ]
    every = scorer.generator.generate(requests, tick)
    found = [every[start : start + samples.count] for start in range(0, len(every), samples.count)]
    groups = [[one.text for one in group] for group in found]
    if task.runs_code:
        check_leave([task], samples)
        scores = scorer.backend.once(lambda: _code_scores(examples, groups, samples.k))
    else:
        voted = (majority([task.answer(text) for text in group]) for group in groups)
        scores = [float(bool(answer) and answer in one.answers) for one, answer in zip(examples, voted, strict=True)]
    return [(score, sum(one.truncated for one in group)) for score, group in zip(scores, found, strict=True)]


def prompt(task: GenerationTask, shots: int, shown: Sequence[Question], example: Question) -> str:
    """Return the text to continue: a heading, the solved examples, and the question."""
    before = "".join(f"{one.solved}{task.separator}" for one in shown_examples(shown, task, shots, example))
    return task.heading(example.group) + before + example.contexts[0]


def _code_scores(examples: Sequence[Question], groups: Sequence[Sequence[str]], k: int) -> list[float]:
    programs = [
        before + text + behind
        for (before, behind), group in zip((one.program for one in examples), groups, strict=True)
        for text in group
    ]
    passed = iter(all_pass(programs))
    return [pass_at(k, len(group), sum(next(passed) for _ in group)) for group in groups]
