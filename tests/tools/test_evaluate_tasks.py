"""tools/evaluate.py --tasks on a finished run: the table, the journal from which it goes on, and bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from calling import Tools

from llama_ds.errors import UserError
from llama_ds.evaluation.figure import read_curves
from llama_ds.evaluation.follow import Follower, follow, result_lines
from llama_ds.evaluation.one_process import saved_at
from llama_ds.job.run_lock import RANKS, RunLock
from tests import warm


def test_tasks_of_a_run_and_their_journal(tools: Tools, words: dict[str, object], tmp_path: Path) -> None:
    """A second call with the same file scores nothing anew and prints the same; another model is refused."""
    options = ("--tasks", "miniature", "--limit", "4", "--results", tmp_path / "results.jsonl", "--json")
    first = tools.call("tools/evaluate.py", words["run"], *options)
    assert first.code == 0, first.err
    found = json.loads(first.out)
    assert [(one["task"], one["examples"]) for one in found["tasks"]] == [
        (f"mini_{name}", 4) for name in ("cloze", "copy", "arithmetic", "brackets")
    ]
    again = tools.call("tools/evaluate.py", words["run"], *options)
    assert json.loads(again.out) == {**found, "examples_done_before": 16}
    assert "results.jsonl: 16 examples were done already" in again.err
    assert found["tasks"][0]["accuracies"].keys() == {"plain", "characters"} and found["truncated_requests"] == 0
    other = tools.call("tools/evaluate.py", words["run"], *options, "--dtype", "bf16")
    assert (other.code, other.out, other.err.count("\n")) == (2, "", 1)
    assert "holds results of" in other.err and "name another file with --results" in other.err


def test_validation_by_source_and_in_bits_per_byte(
    words: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """The run itself has recorded the same of all rows and of each source alone."""
    from tools import evaluate

    assert evaluate.main([str(words["run"])]) == 0
    total, *sources = capsys.readouterr().out.splitlines()
    pattern = r" \| 4 rows \| 1\d\d tokens \| loss [\d.]+ \| perplexity [\d.]+ \| [\d.]+ bits per byte$"
    assert re.search(pattern, total)
    assert [line.split(":")[0].strip() for line in sources] == ["code", "prose"]
    assert evaluate.main([str(words["run"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = map(json.loads, (Path(str(words["run"])) / "metrics.jsonl").read_text().splitlines())
    (recorded,) = [line for line in lines if "val_loss" in line]
    for suffix, one in {"": found, **{f"/{name}": one for name, one in found["sources"].items()}}.items():
        assert recorded[f"val_loss{suffix}"] == pytest.approx(one["loss"], rel=1e-5)
        assert recorded[f"bits_per_byte{suffix}"] == pytest.approx(one["bits_per_byte"], rel=1e-5)
        assert recorded[f"val_tokens{suffix}"] == one["tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "pica"), "task 'pica': unknown (did you mean 'piqa'?)"),
        (("--tasks", "piqa", "--data", "nowhere"), "nowhere/piqa/validation.jsonl: missing; on a machine with a"),
        (("piqa",), "'piqa' is one word too many; name tasks with --tasks piqa"),
        (("--tasks", "miniature", "--rows", "4"), "--rows and --source belong to the validation loss"),
        (("--tasks", "mini_copy,code"), "task humaneval: runs programs that the model writes; allow it with"),
        (("--tasks", "miniature", "--pp", "2"), "--pp, --tp and --cp divide a model over the ranks of a launcher"),
        (("--follow",), "--follow evaluates tasks; name them with --tasks"),
        (("--tasks", "gsm8k", "--pass-at", "2"), "--pass-at 2 needs 2 samples or more: --samples 2"),
    ],
    ids=[
        *("unknown task", "not fetched", "a word too many", "option of the loss", "code", "alone", "nothing to follow"),
        "too few samples",
    ],
)
def test_bad_input_is_one_line(
    tools: Tools, words: dict[str, object], arguments: tuple[str, ...], message: str
) -> None:
    done = tools.call("tools/evaluate.py", words["run"], *arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
    assert message in done.err


def copied(words: dict[str, object], tmp_path: Path) -> Path:
    """Return a copy of the run's folder that a test may change."""
    return Path(shutil.copytree(str(words["run"]), tmp_path / "copy"))


def test_following_a_finished_run_evaluates_what_it_has(tools: Tools, words: dict[str, object], tmp_path: Path) -> None:
    """Once: a second call finds nothing new. The figure shows the results."""
    run = copied(words, tmp_path)
    options = ("--tasks", "mini_copy", "--limit", "4", "--follow")
    done = tools.call("tools/evaluate.py", run, *options)
    assert done.code == 0, done.err
    assert re.fullmatch(
        rf"step 3 \| mini_copy [\d.]+ ± [\d.]+\n{run}: the run has ended; 1 checkpoints were .*\n", done.out
    )
    (line,) = result_lines(str(run / "tasks.jsonl"))
    assert (line["step"], line["tasks_tokens"]) == (3, 3 * 8 * 48)
    assert [point for point, _ in read_curves([str(run)])["mini_copy"]["copy"]] == [3 * 8 * 48]
    again = tools.call("tools/evaluate.py", run, *options, "--json")
    assert (again.code, json.loads(again.out)) == (0, [])


def test_following_waits_while_the_run_is_held(words: dict[str, object], tmp_path: Path) -> None:
    """A checkpoint that appears while a job holds the run is evaluated; then the run ends."""
    run = copied(words, tmp_path)
    lock = RunLock(str(run), RANKS)
    lock.acquire()
    first = run / "checkpoints" / "step_00000003"

    def new_checkpoint(seconds: float) -> None:
        shutil.copytree(first, run / "checkpoints" / "step_00000004")
        lock.release()

    evaluated = []

    def evaluate(path: str, journal: str) -> dict[str, Any]:
        evaluated.append((Path(path).name, Path(journal).parent == run / "tasks"))
        return {"tasks": []}

    lines = follow(Follower(str(run), "names"), evaluate, wait=new_checkpoint)
    assert evaluated == [("step_00000003", True), ("step_00000004", True)] and len(lines) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no job trains this run, and it has no checkpoint"):
        follow(Follower(str(tmp_path / "empty"), "names"), evaluate)


def test_another_model_in_the_same_folder_is_told_apart(tmp_path: Path) -> None:
    """Even where its files are as large and no newer than the newest one, in a folder below."""
    weights = tmp_path / "iter_1" / "mp_rank_00" / "weights.pt"
    weights.parent.mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    found = set()
    for content, seconds in (("one", 100), ("two", 99)):
        weights.write_text(content)
        os.utime(weights, (seconds, seconds))
        assert saved_at(str(tmp_path)) == saved_at(str(tmp_path))
        found.add(saved_at(str(tmp_path)))
    assert len(found) == 2
    with pytest.raises(FileNotFoundError):
        saved_at(str(tmp_path / "removed"))


@pytest.mark.slow
def test_ranks_of_a_launcher_give_the_results_of_one_process(
    tools: Tools, words: dict[str, object], tmp_path: Path
) -> None:
    """The model is cut into two stages; the first rank alone answers and writes the journal, from which all ranks go on
    after a kill in the midst."""
    (tmp_path / "gsm8k").mkdir()
    question = {"question": "One and one?", "answer": "#### 2"}
    (tmp_path / "gsm8k" / "test.jsonl").write_text(2 * (json.dumps(question) + "\n"))
    options = ("--tasks", "mini_copy,gsm8k", "--shots", "0", "--limit", "4", "--data", tmp_path, "--json")
    alone = tools.call("tools/evaluate.py", words["run"], *options)
    assert alone.code == 0, alone.err
    journal = ("--results", tmp_path / "results.jsonl")
    command = ("tools/evaluate.py", "--local_rank=0", words["run"], *options, "--pp", "2")
    with (tmp_path / "killed.log").open("wb") as log:
        killed = warm.start([*command, *journal], log, ranks=2)
        deadline = time.monotonic() + 300
        while not (tmp_path / "results.jsonl").exists() or (tmp_path / "results.jsonl").read_bytes().count(b"\n") < 5:
            assert killed.poll() is None and time.monotonic() < deadline, (tmp_path / "killed.log").read_text()
            time.sleep(0.02)
        killed.kill()
    together = warm.run(*command, *journal, ranks=2)
    assert together.returncode == 0, together.stderr
    one, two = (json.loads(text) for text in (alone.out, together.stdout))
    assert one.pop("examples_done_before") == 0 and two.pop("examples_done_before") >= 4
    for task, other in zip(one.pop("tasks"), two.pop("tasks"), strict=True):
        share = task.pop("probability")  # None: gsm8k's answers are generated
        assert other.pop("probability") == (share and pytest.approx(share, rel=1e-5))
        assert task == other
    assert one == two | {"cache_bytes": one["cache_bytes"]}
    assert 0 < two["cache_bytes"] < one["cache_bytes"]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 4 + 2
    refused = warm.run(*command[:-2], "--pp", "1", "--cp", "3", ranks=2)
    assert refused.returncode == 2 and refused.stdout == ""
    assert re.search(r"world size 2 is not a multiple of .*parallel\.cp 3", refused.stderr), refused.stderr
    assert refused.stderr.count("error:") == 1
