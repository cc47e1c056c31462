"""Benchmarks and samples along training: in files and on the console; the run is the one without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import TRAIN, alone, forked, run
from tiny_run import Corpus, write_run

PP2 = {"training.steps": 4, "parallel.pp": 2, "evaluation.rows": 0, "checkpoint.save": False}
TASKS = {"evaluation.tasks": ["mini_copy", "mini_brackets"], "evaluation.task_interval": 2}
PROMPTS = ["def f(x):\n    ", ""]
SAMPLES = {"sample_prompts": PROMPTS, "sample_interval": 2, "sample_tokens": 5, "sample_temperature": 0.5}


@pytest.mark.slow
def test_losses_are_those_of_a_run_without_tasks_and_samples(tmp_path: Path, corpus: Corpus) -> None:
    plain = write_run(tmp_path, "plain", corpus, PP2)
    samples = {f"evaluation.{key}": value for key, value in SAMPLES.items()}
    tested = write_run(tmp_path, "tested", corpus, PP2 | TASKS | samples | {"evaluation.task_examples": 20})
    for one in (plain, tested):
        done = run(forked(2, TRAIN, one.file), one.log)
        assert done.code == 0, done.output
    assert tested.losses == plain.losses, "to the bit"
    lines = [line for line in tested.metrics if "tasks_tokens" in line]
    assert [(line["step"], line["tasks_tokens"]) for line in lines] == [(2, 2 * 8 * 48), (4, 4 * 8 * 48)]
    for line in lines:
        assert 0 <= line["tasks/mini_copy"] <= 1 and 0 < line["tasks_share/mini_brackets"] < 1
    accuracy, stderr = (100 * lines[-1][f"{name}/mini_copy"] for name in ("tasks", "tasks_stderr"))
    written = [json.loads(line) for line in (tested.dir / "samples.jsonl").read_text().splitlines()]
    assert [(one["step"], one["prompt"]) for one in written] == [
        (step, prompt) for step in (2, 4) for prompt in PROMPTS
    ]
    assert all(one["text"] for one in written)
    assert f"step 4 | {PROMPTS[0]!r} -> {written[2]['text']!r}" in done.output
    assert f"step 4 | mini_copy {accuracy:.1f} ± {stderr:.1f}, mini_brackets" in done.output


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["mini_copi"], "evaluation.tasks: task 'mini_copi': unknown (did you mean 'mini_copy'?)"),
        ([], "evaluation.sample_prompts.0 = 'xyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxy"),
        (["piqa"], "piqa/validation.jsonl: missing; on a machine with a network, run tools/evaluate.py fetch piqa"),
    ],
)
def test_bad_tasks_end_the_start(tmp_path: Path, corpus: Corpus, tasks: list[str], message: str) -> None:
    prompts = [] if tasks else ["xy" * 100]
    bad = write_run(tmp_path, "bad", corpus, {"evaluation.tasks": tasks, "evaluation.sample_prompts": prompts})
    done = run(alone(TRAIN, bad.file), bad.log)
    assert done.code == 2 and len(done.errors) == 1, done.output
    assert message in done.errors[0]
    assert not (bad.dir / "metrics.jsonl").exists(), json.dumps(done.errors)
