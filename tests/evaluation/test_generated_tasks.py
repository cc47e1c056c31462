"""Tasks whose answers are generated: prompts from each data set's layout, what counts as an answer, and programs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from llama_ds.errors import UserError
from llama_ds.evaluation.code_runs import all_pass, has_no_network, passes
from llama_ds.evaluation.evaluate import Journal, evaluate, prepare, table
from llama_ds.evaluation.generated_answers import boxed_answer, final_number, majority, pass_at, plain_words
from llama_ds.evaluation.generated_outcomes import check_leave
from llama_ds.evaluation.generation import Generated, GenerationRequest, cut_at
from llama_ds.evaluation.generation_tasks import GenerationTask, Samples
from llama_ds.evaluation.suite import TASKS, find_tasks

T = TypeVar("T")
ALLOWED = Samples(run_code=True)

# Two lines of each data set as the hub has it, the prompt of the second after the first, and a right continuation.
LINES: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "nq": (
        [{"question": "who sang", "answer": ["Sinatra", "Frank"]}, {"question": "who wrote", "answer": ["Paul"]}],
        "Answer these questions:\nQ: who sang\nA: Sinatra\nQ: who wrote\nA:",
        " the Paul.",
    ),
    "triviaqa": (
        [
            {"question": "In Scotland?", "answer": {"value": "House", "aliases": ["A hut"]}},
            {"question": "Troy?", "answer": {"value": "Turkey", "aliases": ["The Republic of Turkey", "Türkiye"]}},
        ],
        "Answer these questions:\nQ: In Scotland?\nA: House\nQ: Troy?\nA:",
        " Republic of Turkey\nQ:",
    ),
    "gsm8k": (
        [
            {"question": "One and one?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
            {"question": "How many?", "answer": "Many.\n#### 1,200"},
        ],
        "Question: One and one?\nAnswer: 1+1=2\n#### 2\n\nQuestion: How many?\nAnswer:",
        " 3 * 400 = 1200.0\n#### $1200.00\n\nQuestion:",
    ),
    "math": (
        [
            {"problem": "P", "level": "Level 1", "type": "Algebra", "solution": r"So $\boxed{2}$."},
            {"problem": "Q", "level": "Level 2", "type": "Algebra", "solution": r"Then $x=\boxed{\dfrac{1}{2}}$."},
        ],
        "Problem:\nP\n\nSolution: So $\\boxed{2}$.\n\nProblem:\nQ\n\nSolution:",
        r" It is $\boxed{\frac12}$.",
    ),
    "humaneval": (
        [
            {
                "task_id": "HumanEval/0",
                "prompt": 'def one():\n    """Return 1."""\n',
                "canonical_solution": "    return 1\n",
                "test": "def check(candidate):\n    assert candidate() == 1\n",
                "entry_point": "one",
            }
        ],
        'def one():\n    """Return 1."""\n',
        "    return 1\n\ndef two():",
    ),
    "mbpp": (
        [
            {"task_id": 1, "text": "First.", "code": "c", "test_list": ["t"], "test_setup_code": ""},
            {"task_id": 2, "text": "Write f.", "code": "def f():\r\n  return 3", "test_list": ["assert f() == 3"],
             "test_setup_code": ""},
        ],
        "You are an expert Python programmer, and here is your task: Write f. Your code should pass these tests:\n\n"
        "assert f() == 3\n[BEGIN]\ndef f():\n  return 3\n[DONE]\n\n"
        "You are an expert Python programmer, and here is your task: Write f. Your code should pass these tests:\n\n"
        "assert f() == 3\n[BEGIN]\n",
        "def f(): return 3\n[DONE] and more",
    ),
}  # fmt: skip


class Writer:
    """Stands for a scorer: answers every request with what `replies` has for it, cut at its stop strings."""

    def __init__(self, *replies: str) -> None:
        self.replies, self.asked = replies, list[GenerationRequest]()
        self.generator = self.backend = self

    def generate(self, requests: list[GenerationRequest], tick: Callable[[int], object]) -> list[Generated]:
        """Return the replies in turn."""
        self.asked += requests
        return [Generated(cut_at(self.replies[r.sample % len(self.replies)], r.until), ()) for r in requests]

    def once(self, work: Any) -> Any:
        """Do the work."""
        return work()


def write(data: Path, name: str) -> str:
    """Write the lines of a task as all its splits; return the data folder."""
    (data / name).mkdir()
    for split in {TASKS[name].split, TASKS[name].shot_split}:
        (data / name / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES[name][0]))
    return str(data)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, GenerationTask)])
def test_each_layout_gives_its_prompt_and_judges_answers(name: str, tmp_path: Path) -> None:
    _, prompt, right = LINES[name]
    shots = 0 if name == "humaneval" else 1
    (work,) = prepare([TASKS[name]], write(tmp_path, name), shots, samples=ALLOWED)
    if name != "mbpp":  # it shows the first of its group
        work.shown[:] = work.shown[:1]
    work.examples[:] = work.examples[-1:]
    scorer = Writer(right)
    result = evaluate(scorer, work)  # type: ignore[arg-type]
    assert scorer.asked[0].context == prompt
    assert (result.accuracy, result.examples, result.probability) == (1.0, 1, None)
    assert evaluate(Writer(" no 17"), work).accuracy == 0.0  # type: ignore[arg-type]


def test_answers_in_their_normal_forms() -> None:
    assert plain_words(" The U.S.A.,  a Land ") == "usa land"
    assert [final_number(text) for text in ("7 and -1,234.50", "a #### $18. 3", "none", "####")] == [
        "-1234.5",
        "18",
        "",
        "",
    ]
    for text, plain in (
        (r"\boxed{\dfrac{3}{4}}", r"\frac{3}{4}"),
        (r"\boxed{3/4}", r"\frac{3}{4}"),
        (r"\boxed{x = 10{,}000}", "10000"),
        (r"\boxed{12\text{ cm}}", "12"),
        (r"\boxed{\left(1, 2\right)}", "(1,2)"),
        (r"\boxed{90^\circ}", "90"),
        (r"$\boxed 5$ or so", "5"),
        (r"\boxed{1{2}} \boxed{\sqrt2}", r"\sqrt{2}"),
        (r"\boxed{1,234.0}", "1234"),
        (r"\boxed{\text{(B)}}", "(B)"),
        (r"\boxed{open", ""),
    ):
        assert boxed_answer(text) == plain, text
    assert majority(["2", "", "3", "3", "2", ""]) == "2" and majority(["", ""]) == ""


def test_a_majority_of_samples_is_judged(tmp_path: Path) -> None:
    """Samples of one question are numbered, and drawn by the task's rule; outcomes of other samples are not reused."""
    data = write(tmp_path, "gsm8k")
    (work,) = prepare([TASKS["gsm8k"]], data, 0, samples=Samples(3))
    scorer = Writer("#### 5", "#### 2", "so 2")
    result = evaluate(scorer, work, Journal(str(tmp_path / "j"), {}))  # type: ignore[arg-type]
    assert (result.accuracy, result.metric) == (0.5, "maj@3")
    assert [request.sample for request in scorer.asked] == [0, 1, 2] * 2
    assert {request.rule.temperature for request in scorer.asked} == {0.6}
    assert "gsm8k maj@3" in table([result])
    (greedy,) = prepare([TASKS["gsm8k"]], data, 0)
    alone = Writer("#### 5")
    assert evaluate(alone, greedy, Journal(str(tmp_path / "j"), {})).accuracy == 0.0  # type: ignore[arg-type]
    assert alone.asked[0].rule.temperature == 0.0
    again = Writer()
    assert evaluate(again, work, Journal(str(tmp_path / "j"), {})) == result  # type: ignore[arg-type]
    assert not again.asked


def test_pass_at_k_is_unbiased(tmp_path: Path) -> None:
    """By hand: of 4 samples 1 passes, so a draw of 2 has it with probability 1/2. Over all draws it is the mean."""
    assert pass_at(2, 4, 1) == pytest.approx(0.5)
    assert (pass_at(1, 5, 2), pass_at(5, 5, 0), pass_at(5, 5, 1)) == (pytest.approx(0.4), 0.0, 1.0)
    p, n, k = 0.3, 6, 2
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at(k, n, c) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k)
    (work,) = prepare([TASKS["humaneval"]], write(tmp_path, "humaneval"), samples=Samples(4, 2, run_code=True))
    result = evaluate(Writer("    return 1", "    return 2", "    retu", "    raise SystemExit"), work)  # type: ignore[arg-type]
    assert (result.accuracy, result.metric) == (pytest.approx(0.5), "pass@2")
    with pytest.raises(UserError, match="--pass-at 3 needs 3 samples or more"):
        Samples(2, 3)


def test_programs_run_only_with_leave(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task humaneval: runs programs .* allow it with .* --run-code"):
        check_leave(find_tasks(["nq", "code"]), Samples())
    check_leave(find_tasks(["nq", "paper"]), Samples())
    (work,) = prepare([TASKS["humaneval"]], write(tmp_path, "humaneval"))
    with pytest.raises(UserError, match="--run-code"):
        evaluate(Writer("    return 1"), work)  # type: ignore[arg-type]


def test_a_program_passes_only_at_its_end(tmp_path: Path) -> None:
    """Neither an early exit, nor an error, nor endless work passes; and it cannot fill memory, disks or the network."""
    outside = tmp_path / "kept"
    outside.write_text("x")
    programs = {
        "assert 1 + 1 == 2": True,
        "import sys; print('text'); print(sys.argv)": True,
        "raise ValueError": False,
        "not python": False,
        "import os; os._exit(0)": False,
        "import sys; sys.exit(0)": False,
        "x = bytearray(3 << 30)": False,
        "open('large', 'wb').write(bytes(64 << 20))": False,
        "open('small', 'w').write('x'); import os; assert os.listdir('.') == ['small']": True,
        "import os; assert 'SECRET' not in os.environ": True,
    }
    if has_no_network():
        programs["import socket; socket.create_connection(('127.0.0.1', 9), 1)"] = False
        programs["import socket; assert [n for _, n in socket.if_nameindex()] == ['lo']"] = True
    assert dict(zip(programs, all_pass(list(programs)), strict=True)) == programs
    begin = time.monotonic()
    assert not passes("while True: pass", seconds=0.3) and time.monotonic() - begin < 30


def test_what_a_program_has_started_ends_with_it(tmp_path: Path) -> None:
    """A child that holds the pipe is killed with its session."""
    program = "import os, time\nif os.fork() == 0:\n    time.sleep(1000)\n"
    assert not passes(program, seconds=0.5)
