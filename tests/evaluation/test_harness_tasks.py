"""Task files for lm-eval: their prompts are those of this project's evaluation. `.ci/ecosystem lm_eval` runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama_ds.evaluation.evaluate import prepare
from llama_ds.evaluation.generated_outcomes import prompt
from llama_ds.evaluation.generation_tasks import GenerationTask
from llama_ds.evaluation.requests import ScoringRequest
from llama_ds.evaluation.suite import find_tasks
from llama_ds.evaluation.tasks import chosen, shown_examples
from tests.evaluation.test_generated_tasks import LINES as QUESTIONS
from tests.evaluation.test_tasks import LINES as CHOICES
from tests.evaluation.test_tasks import write
from tools import evaluate

NAMES = "mini_copy,winogrande,openbookqa,mmlu,nq"  # one of each kind


@pytest.fixture
def data(tmp_path: Path) -> str:
    for name in ("winogrande", "openbookqa", "mmlu"):
        write(tmp_path / "data", name, CHOICES[name][0])
    return write(tmp_path / "data", "nq", *QUESTIONS["nq"][0])


def test_prompts_are_those_of_the_evaluation(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a shown example, and with the requests of the answer context."""
    out = tmp_path / "out"
    options = ["--data", data, "--shots", "1", "--limit", "3", "--out", str(out)]
    assert evaluate.main(["harness", f"{NAMES},race", *options]) == 2  # no data of race
    assert "race_middle/train.jsonl: missing" in capsys.readouterr().err and not out.exists()
    assert evaluate.main(["harness", NAMES, *options]) == 0
    for work in prepare(find_tasks(NAMES.split(",")), data, 1, 3):
        task, name = work.task, f"llama_ds_{work.task.name}"
        lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        text = (out / f"{name}.yaml").read_text()
        assert f"task: {name}\n" in text and f"version: {task.version}, num_fewshot: 1," in text
        for line, example in zip(lines, work.examples, strict=True):
            if isinstance(task, GenerationTask):
                assert line["context"] == prompt(task, 1, work.shown, example)  # type: ignore[arg-type]
                assert tuple(line["answers"]) == example.answers  # type: ignore[attr-defined]
                continue
            contexts = line["contexts"] or [line["context"]] * len(line["continuations"])
            bare = [line["answer_context"]] * len(contexts) if line["answer_context"] else []
            pairs = zip(contexts + bare, line["continuations"] * 2, strict=False)
            wanted = chosen(task, shown_examples(work.shown, task, 1, example), example)
            assert [ScoringRequest(*pair) for pair in pairs] == wanted
            assert (line["gold"], tuple(line["completions"])) == (example.gold, example.completions)


def test_what_the_files_call_needs_no_other_package(tmp_path: Path) -> None:
    """They may be copied to where only lm-eval is installed."""
    assert evaluate.main(["harness", "miniature", "--limit", "1", "--out", str(tmp_path)]) == 0
    group = (tmp_path / "llama_ds_miniature.yaml").read_text()
    assert "group: llama_ds_miniature" in group and "llama_ds_mini_brackets" in group
    program = "import sys; sys.path.insert(0, '.'); import choice_scores, generated_answers"
    subprocess.run([sys.executable, "-ISc", program], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("harness",), "harness needs the names of tasks"),
        (("harness", "miniature"), "harness needs a folder to write to: --out DIR"),
        (("harness", "code", "--out", "x"), "task humaneval: runs programs that the model writes, which lm-eval"),
        (("fetch", "piqa", "--out", "x"), "--out is the folder that the word harness writes to"),
    ],
    ids=["no tasks", "no folder", "code", "not harness"],
)
def test_bad_input_is_one_line(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(list(words)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
