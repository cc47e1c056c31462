"""Task files for lm-evaluation-harness: its --include_path then runs the protocol of this project on any of its models.

The prompts are written out, so that wording, shown examples and their order have one owner.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from llama_ds.atomic_files import atomic_file, write_atomically
from llama_ds.config.text import dump_yaml, save_text
from llama_ds.errors import UserError
from llama_ds.evaluation import choice_scores, generated_answers
from llama_ds.evaluation.evaluate import Work
from llama_ds.evaluation.generated_outcomes import prompt
from llama_ds.evaluation.generation_tasks import GenerationTask, Question
from llama_ds.evaluation.suite import GROUPS
from llama_ds.evaluation.tasks import Example, Task, chosen, shown_examples

PREFIX = "llama_ds_"  # before the names of tasks and groups, because the harness has its own piqa
PROTOCOL = Path(__file__).with_name("harness_protocol.py")
CHOICES, ANSWERS = Path(choice_scores.__file__), Path(generated_answers.__file__)


def check_writable(tasks: Sequence[Task]) -> None:
    """Check that the harness can run the tasks.

    Raises:
        UserError: one runs code.
    """
    if named := [task.name for task in tasks if isinstance(task, GenerationTask) and task.runs_code]:
        raise UserError(
            f"task {named[0]}: runs programs that the model writes, which lm-eval would do without limits; evaluate it "
            "with tools/evaluate.py --run-code"
        )


def write_tasks(works: Sequence[Work], names: Sequence[str], folder: str) -> list[str]:
    """Write a YAML file and the prompts of each task, one YAML file for each group in `names`, and what they call.

    Returns the names that the harness knows the tasks and groups by.
    """
    os.makedirs(folder, exist_ok=True)
    for source in (PROTOCOL, CHOICES, ANSWERS):
        write_atomically(os.path.join(folder, source.name), source.read_bytes())
    for work in works:
        task, name = work.task, PREFIX + work.task.name
        generates = isinstance(task, GenerationTask)
        with atomic_file(os.path.join(folder, f"{name}.jsonl")) as file:
            for example in work.examples:
                line = _question(work, example) if generates else _choice(work, example)
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        _write(folder, name, *(_answers_file(task) if isinstance(task, GenerationTask) else _choices_file(task)), work)
    groups = [name for name in names if name in GROUPS]
    for name in groups:
        members = [PREFIX + task.name for task in GROUPS[name]]
        text = dump_yaml({"group": PREFIX + name, "task": members})
        save_text(os.path.join(folder, f"{PREFIX}{name}.yaml"), text)
    return [PREFIX + name for name in (*groups, *(work.task.name for work in works))]


def _choice(work: Work, example: Example) -> dict[str, Any]:
    requests = chosen(work.task, shown_examples(work.shown, work.task, work.shots, example), example)
    count = len(example.completions)
    contexts = [one.context for one in requests[:count]]
    return {
        "context": contexts[example.gold],
        "contexts": contexts if len(set(contexts)) > 1 else [],
        "continuations": [one.continuation for one in requests[:count]],
        "completions": list(example.completions),
        "answer_context": requests[count].context if len(requests) > count else "",
        "gold": example.gold,
        "group": example.group,
    }


def _question(work: Work, example: Example) -> dict[str, Any]:
    task, shown, asked = cast(GenerationTask, work.task), cast(list[Question], work.shown), cast(Question, example)
    return {"context": prompt(task, work.shots, shown, asked), "answers": list(asked.answers)}


def _choices_file(task: Task) -> tuple[dict[str, Any], dict[str, str]]:
    names = ["acc", "acc_norm", *(["acc_answer"] if task.normalization == "answer" else [])]
    plain = {
        "output_type": "multiple_choice",
        "doc_to_choice": "continuations",
        "doc_to_target": "gold",
        "metric_list": [_metric(name) for name in names],
    }
    functions = {
        "class": f"{PROTOCOL.stem}.WrittenChoices",
        "scores": f"{CHOICES.stem}.{choice_scores.choice_scores.__name__}",
        "right": f"{CHOICES.stem}.{choice_scores.chosen_is_right.__name__}",
    }
    return plain, functions


def _answers_file(task: GenerationTask) -> tuple[dict[str, Any], dict[str, str]]:
    plain = {
        "output_type": "generate_until",
        "doc_to_target": "{{answers[0]}}",
        "generation_kwargs": {"until": list(task.stops), "max_gen_toks": task.max_tokens, "do_sample": False},
        "metric_list": [_metric("acc")],
    }
    functions = {"class": f"{PROTOCOL.stem}.WrittenAnswers", "answer": f"{ANSWERS.stem}.{task.answer.__name__}"}
    return plain, functions


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def _write(folder: str, name: str, plain: dict[str, Any], functions: dict[str, str], work: Work) -> None:
    task = work.task
    about: dict[str, Any] = {"version": task.version, "num_fewshot": work.shots, "normalization": task.normalization}
    about["data"] = f"{task.dataset} {task.subset} {task.split}" if task.dataset else "made from a seed"
    # With 0 here lm-eval ignores --num_fewshot: the shown examples are part of the prompts.
    content = {"task": name, "test_split": "test", "num_fewshot": 0, "doc_to_text": "context", **plain}
    calls = "".join(f"{key}: !function {function}\n" for key, function in functions.items())
    save_text(os.path.join(folder, f"{name}.yaml"), dump_yaml(content | {"metadata": about}) + calls)
