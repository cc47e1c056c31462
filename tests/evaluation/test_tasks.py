"""Tasks: the requests made of each data set's layout, normalization by hand, journals, data, and bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from llama_ds.errors import UserError
from llama_ds.evaluation.evaluate import Journal, evaluate, in_words, metrics_of, prepare, table
from llama_ds.evaluation.fetch import fetch
from llama_ds.evaluation.generation_tasks import GenerationTask
from llama_ds.evaluation.miniature import BRACKETS, MAKERS, PHRASES, SHOWN_PHRASES, examples
from llama_ds.evaluation.requests import Score, ScoringRequest
from llama_ds.evaluation.suite import TASKS, find_tasks, read_examples
from llama_ds.evaluation.tasks import Example, chosen

ARC = {"question": "Why?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "B"}
# One line of each data set as the hub has it, then the requests of the right choice.
LINES: dict[str, tuple[dict[str, Any], str, str]] = {
    "boolq": ({"question": "is it", "passage": "Long.", "answer": True}, "Long.\nQuestion: is it?\nAnswer:", " yes"),
    "piqa": ({"goal": "Cut", "sol1": "a knife", "sol2": "a spoon", "label": 0}, "Question: Cut\nAnswer:", " a knife"),
    "social_iqa": (
        {"context": "Al ran.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"},
        "Q: Al ran. Why?\nA:",
        " z",
    ),
    "hellaswag": (
        {"activity_label": "Run", "ctx_a": "A man", "ctx_b": "he", "endings": ["[step] goes.", "flies."], "label": "0"},
        "Run: A man He",
        "  goes.",
    ),
    "winogrande": (
        {"sentence": "Al saw Bo so _ ran off.", "option1": "Al", "option2": "Bo", "answer": "2"},
        "Al saw Bo so Bo",
        " ran off.",
    ),
    "arc_easy": (ARC, "Question: Why?\nAnswer:", " two"),
    "arc_challenge": (ARC, "Question: Why?\nAnswer:", " two"),
    "openbookqa": ({"question_stem": "The sun is", **ARC}, "The sun is", " two"),
    "race_middle": (
        {"article": "Text.", "question": "Who?", "options": ["a", "b", "c", "d"], "answer": "C"},
        "Text.\n\nQuestion: Who?\nAnswer:",
        " c",
    ),
    "race_high": (
        {"article": "Text.", "question": "Who?", "options": ["a", "b", "c", "d"], "answer": "C"},
        "Text.\n\nQuestion: Who?\nAnswer:",
        " c",
    ),
    "mmlu": (
        {"question": "1+1?", "subject": "high_school_math", "choices": ["1", "2", "3", "4"], "answer": 1},
        "The following are multiple choice questions (with answers) about high school math.\n\n"
        "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
        " B",
    ),
}


class ByTable:
    """Stands for a scorer: looks log-likelihoods up, and counts requests."""

    def __init__(self, values: dict[ScoringRequest, float] | None = None, stop_after: int = 10**9) -> None:
        self.values, self.asked, self.stop_after = values or {}, 0, stop_after

    def log_likelihoods(self, requests: list[ScoringRequest], tick: Callable[[int], object]) -> list[Score]:
        """Return the values of requests; every other context counts as truncated."""
        self.asked += len(requests)
        if self.asked > self.stop_after:
            raise KeyboardInterrupt
        tick(len(requests))
        return [
            Score(self.values.get(one, -float(len(one.continuation))), False, len(one.context) % 2 == 0)
            for one in requests
        ]


def write(data: Path, task: str, *lines: dict[str, Any]) -> str:
    """Write lines as all splits of a task; return the data folder."""
    (data / task).mkdir(parents=True, exist_ok=True)
    for split in {TASKS[task].split, TASKS[task].shot_split}:
        (data / task / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(data)


@pytest.mark.parametrize(
    "name", [name for name, task in TASKS.items() if task.dataset and not isinstance(task, GenerationTask)]
)
def test_each_layout_gives_its_requests(name: str, tmp_path: Path) -> None:
    line, context, completion = LINES[name]
    (example,) = read_examples(write(tmp_path, name, line), TASKS[name])
    assert chosen(TASKS[name], [], example)[example.gold] == ScoringRequest(context, completion)


def test_characters_and_answer_normalization_by_hand(tmp_path: Path) -> None:
    """Of -6 and -8 nats the shorter text wins as a sum; per character -6 / 2 loses against -8 / 4. OpenBookQA subtracts
    log P(completion | "Answer:") instead: -6 + 7 = 1 beats -8 + 8 = 0."""
    line = {"choices": {"text": ["ab", "abcd"], "label": ["A", "B"]}, "answerKey": "A"}
    asked = {"arc_easy": "Question: Q\nAnswer:", "openbookqa": "Q"}
    found = {}
    for name, context in asked.items():
        data = write(tmp_path, name, {"question": "Q", "question_stem": "Q", **line})
        scorer = ByTable(
            {
                ScoringRequest(context, " ab"): -6.0,
                ScoringRequest(context, " abcd"): -8.0,
                ScoringRequest("Answer:", " ab"): -7.0,
                ScoringRequest("Answer:", " abcd"): -8.0,
            }
        )
        (work,) = prepare([TASKS[name]], data)
        found[name] = evaluate(scorer, work)  # type: ignore[arg-type]
    assert (found["arc_easy"].accuracy, found["openbookqa"].accuracy) == (0.0, 1.0)
    assert found["arc_easy"].accuracies == {"plain": 1.0, "characters": 0.0}
    assert found["openbookqa"].accuracies == {"plain": 1.0, "characters": 0.0, "answer": 1.0}
    assert found["arc_easy"].probability == pytest.approx(math.exp(-3) / (math.exp(-3) + math.exp(-2)))
    assert found["openbookqa"].probability == pytest.approx(math.e / (math.e + 1))


def test_marks_of_hellaswag_are_removed_as_in_the_harness() -> None:
    """Values of lm-eval's preprocess: outer white space goes first, so that what a mark leaves stays."""
    line = LINES["hellaswag"][0]
    odd = {
        " [header] Cut [title] Hold it. [step] Then  cut": " Cut. Hold it. Then cut",
        "Stop [substeps]": "Stop ",
        "a[b[c]d] e": "ad] e",
        "[x\ny] two\n": "[x\ny] two",
        "one   two": "one  two",
        "[title] At the start [title]": " At the start. ",
    }
    task = TASKS["hellaswag"]
    example = task.example({**line, "ctx_a": "[header] Go", "ctx_b": "", "endings": list(odd), "label": "1"})
    assert example.completions == tuple(odd.values())
    assert example.contexts[0] == "Run: Go"
    assert task.example({**line, "ctx_b": "[Step]"}).contexts[0] == "Run: A man "


def test_shown_examples_are_of_the_same_subject(tmp_path: Path) -> None:
    line, context, _ = LINES["mmlu"]
    other = {**line, "subject": "law", "question": "Guilty?"}
    data = write(tmp_path, "mmlu", line, other)
    (work,) = prepare([TASKS["mmlu"]], data, shots=1)
    heading, question = context.split("\n\n")
    asked: list[ScoringRequest] = []
    scorer = ByTable()
    scorer.log_likelihoods = lambda requests, tick: asked.extend(requests) or [Score(0.0, False)] * len(requests)  # type: ignore
    result = evaluate(scorer, work)  # type: ignore[arg-type]
    assert asked[0] == ScoringRequest(f"{heading}\n\n{question} B\n\n{question}", " A")
    assert (result.shots, result.examples) == (1, 2)
    with pytest.raises(UserError, match=r"^mmlu, subject high_school_math, has 1 examples to show .* fewer than 5"):
        prepare([TASKS["mmlu"]], data)
    with pytest.raises(UserError, match=r"--shots 2: mmlu, subject high_school_math, has 1 examples to show"):
        prepare([TASKS["mmlu"]], data, shots=2)


def test_a_limit_takes_examples_of_all_subjects(tmp_path: Path) -> None:
    lines = [{**LINES["mmlu"][0], "subject": name, "question": str(i)} for name in ("a", "b", "c") for i in range(3)]
    (work,) = prepare([TASKS["mmlu"]], write(tmp_path, "mmlu", *lines), shots=1, limit=4)
    assert [(one.group, one.contexts[0][0]) for one in work.examples] == [
        ("a", "0"),
        ("a", "1"),
        ("b", "0"),
        ("c", "0"),
    ]


def test_a_killed_evaluation_goes_on(tmp_path: Path) -> None:
    """Blocks that were written are not scored again, a line that the kill cut is; the result is that of one pass."""
    (work,) = prepare(find_tasks(["mini_copy"]), "unused")
    path, subject = str(tmp_path / "results.jsonl"), {"model": "m"}
    whole = ByTable()
    expected = evaluate(whole, work)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        evaluate(ByTable(stop_after=600), work, Journal(path, subject))  # type: ignore[arg-type]
    with open(path, "rb+") as file:
        file.truncate(len(file.read()) - 9)
    again, ticks = ByTable(), list[int]()
    found = evaluate(again, work, Journal(path, subject), tick=ticks.append)  # type: ignore[arg-type]
    assert found == expected and 0 < found.truncated_requests < work.requests, "counted before the kill too"
    count = found.truncated_requests
    assert table([found]).splitlines()[1].endswith(f"  {count}") and "truncated" in table([found])
    assert in_words([found]).endswith(f" ({count} requests truncated)")
    assert metrics_of([found])["tasks_truncated/mini_copy"] == count
    cured = replace(found, truncated_requests=0)
    assert not any("truncated" in text for text in (table([cured]), in_words([cured]), *metrics_of([cured])))
    assert sum(ticks) == work.requests == 200 * 4
    assert again.asked == whole.asked - 127 * 4
    with pytest.raises(UserError, match=r"not of \{'model': 'other'\}"):
        Journal(path, {"model": "other"})
    other = replace(work, examples=work.examples[::-1])
    evaluate(again, other, Journal(path, subject))  # type: ignore[arg-type]
    assert again.asked == 2 * whole.asked - 127 * 4, "outcomes of other data are not taken for its own"


@pytest.mark.parametrize("content", ['{"precious": 1}', "two lines\nof text", "[1]\n"])
def test_a_file_that_is_no_journal_is_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text(content)
    with pytest.raises(UserError, match="is no journal of an evaluation"):
        Journal(str(tmp_path / "mine"), {"model": "m"})
    assert (tmp_path / "mine").read_text() == content


def test_a_hidden_label_is_refused() -> None:
    with pytest.raises(ValueError, match="its label names choice -1 of 0 to 1"):
        Example(("a", "a"), ("b", "c"), -1)


def test_the_miniature_suite_asks_each_question_once() -> None:
    """The standard error holds for independent outcomes only, and no example shown may hold the answer."""
    for name in MAKERS:
        first, shown = examples(name), examples(name, shown=True)
        assert first == examples(name) != examples(name, seed=1)
        assert (len(first), len(shown)) == (200, 100)
        assert len({one.solved for one in first + shown}) == 300
        assert all(len(set(zip(*one[:2], strict=True))) >= 3 for one in map(astuple, first + shown))
        if name == "mini_arithmetic":  # 1 + 2 is asked as 2 + 1 neither
            assert len({frozenset(one.contexts[0].split()) for one in first + shown}) == 300
        share = [sum(one.gold == place for one in first) / len(first) for place in range(3)]
        assert min(share) > 0.15, "the right choice is at every place"


def test_what_the_miniature_suite_asks_has_one_answer() -> None:
    """Of the phrases only one goes on with the word, of the lists only one holds it, of the brackets only one fits."""
    asked, shown = (
        {phrase: word for word, some in found.items() for phrase in some} for found in (PHRASES, SHOWN_PHRASES)
    )
    assert not asked.keys() & shown.keys()
    for phrases, examples_ in ((asked, examples("mini_cloze")), (shown, examples("mini_cloze", shown=True))):
        for one in examples_:
            words = [phrases[context.split(" ", 2)[2]] for context in one.contexts]
            assert [word == one.completions[0] for word in words] == [n == one.gold for n in range(4)]
    for one in examples("mini_copy"):
        lists = [context.split("\n") for context in one.contexts]
        assert [whole.startswith(f"{begun} {one.completions[0]} ") for whole, begun in lists].index(True) == one.gold
        assert sum(one.completions[0] in whole.split() for whole, _ in lists) == 1
    for one in examples("mini_brackets"):
        opened = [innermost(context) for context in one.contexts]
        assert [BRACKETS[open_] == one.completions[0] for open_ in opened] == [n == one.gold for n in range(3)]


def innermost(text: str) -> str:
    """Return the last bracket that is not closed."""
    found: list[str] = []
    for mark in text.split(" "):
        if mark in BRACKETS:
            found.append(mark)
        elif mark in BRACKETS.values():
            assert BRACKETS[found.pop()] == mark
    return found[-1]


def test_fetched_data_is_read_and_kept(tmp_path: Path) -> None:
    """Parquet files of the hub become lines; a second fetch downloads nothing."""
    asked = []

    def download(repository: str, subset: str, split: str) -> list[str]:
        asked.append((repository, subset, split))
        path = tmp_path / f"{split}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ARC, ARC]), path)
        return [str(path)]

    data = str(tmp_path / "data")
    written = fetch(TASKS["arc_easy"], data, download)
    assert asked == [("allenai/ai2_arc", "ARC-Easy", split) for split in ("test", "train")]
    assert len(read_examples(data, TASKS["arc_easy"])) == 2 == len(written)
    assert fetch(TASKS["arc_easy"], data, download) == [] and len(asked) == 2


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task 'hellaswga': unknown \(did you mean 'hellaswag'\?\)"):
        find_tasks(["hellaswga"])
    with pytest.raises(UserError, match=r"piqa/validation.jsonl: missing; .* tools/evaluate.py fetch piqa --data"):
        prepare(find_tasks(["piqa"]), str(tmp_path))
    data = write(tmp_path, "piqa", LINES["piqa"][0], {"goal": "x"})
    with pytest.raises(UserError, match=r"validation.jsonl:2: not an example of piqa \(KeyError: 'sol1'\)"):
        prepare(find_tasks(["piqa"]), data)


def test_table_has_standard_errors() -> None:
    """The standard error of an accuracy p of n examples is the root of p (1 - p) / (n - 1)."""
    (work,) = prepare(find_tasks(["mini_copy"]), "unused", limit=20)
    result = evaluate(ByTable(), work)  # type: ignore[arg-type]
    p = result.accuracy
    assert result.stderr == pytest.approx(math.sqrt(p * (1 - p) / 19))
    error = 100 * result.stderr
    assert f"*{100 * p:.1f} ± {error:.1f}" in table([result]), "the paper's choice is marked"
