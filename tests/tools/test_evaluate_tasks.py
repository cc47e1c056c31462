"""tools/evaluate.py --tasks on a finished run: the table, the journal from which it goes on, and bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from calling import Tools


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
    from tools import evaluate

    assert evaluate.main([str(words["run"])]) == 0
    total, *sources = capsys.readouterr().out.splitlines()
    assert re.search(r" \| 4 rows \| loss [\d.]+ \| perplexity [\d.]+ \| [\d.]+ bits per byte$", total)
    assert [line.split(":")[0].strip() for line in sources] == ["code", "prose"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "pica"), "task 'pica': unknown (did you mean 'piqa'?)"),
        (("--tasks", "piqa", "--data", "nowhere"), "nowhere/piqa/validation.jsonl: missing; on a machine with a"),
        (("piqa",), "'piqa' is one word too many; name tasks with --tasks piqa"),
        (("--tasks", "miniature", "--rows", "4"), "--rows and --source belong to the validation loss"),
    ],
    ids=["unknown task", "not fetched", "a word too many", "option of the loss"],
)
def test_bad_input_is_one_line(
    tools: Tools, words: dict[str, object], arguments: tuple[str, ...], message: str
) -> None:
    done = tools.call("tools/evaluate.py", words["run"], *arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
    assert message in done.err
