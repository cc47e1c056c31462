"""Tasks in which the model writes its answer, after the LLaMA paper (arXiv 2302.13971, sections 3.2, 3.4 and 3.5).

docs/evaluation.md says where the paper is silent and what is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llama_ds.errors import UserError
from llama_ds.evaluation.choice_scores import PLAIN
from llama_ds.evaluation.generated_answers import boxed_answer, final_number, plain_words
from llama_ds.evaluation.tasks import Example, Task
from llama_ds.model.decoding_rule import GREEDY, DecodingRule

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Question(Example):
    """A text to continue; its only completion is the solution that is shown before other questions."""

    answers: tuple[str, ...] = ()  # all that count, in the task's normal form
    program: tuple[str, str] = ("", "")  # code before and behind a generated solution, which tests it

    @property
    def solved(self) -> str:
        return self.contexts[0] + self.completions[0]


def question(context: str, solution: str, answers: tuple[str, ...] = (), **others: Any) -> Question:
    """Return a question with its solution.

    Raises:
        ValueError: no answer is left, as where a data set hides those of its test split.
    """
    if not any(answers) and not others.get("program"):
        raise ValueError("it has no answer")
    return Question((context,), (solution,), 0, answers=answers, **others)


@dataclass(frozen=True)
class Samples:
    """How many continuations of a question are judged, and how they are drawn."""

    count: int = 1
    k: int = 1  # the k in pass@k
    temperature: float | None = None  # None: that of the task
    seed: int = 0
    run_code: bool = False  # leave to run generated programs

    def __post_init__(self) -> None:
        if self.k > self.count:
            raise UserError(f"command line: --pass-at {self.k} needs {self.k} samples or more: --samples {self.k}")

    @property
    def words(self) -> str:
        """What outcomes depend on; empty for the default."""
        default = replace(Samples(), run_code=self.run_code)
        return "" if self == default else f" samples {self.count} k {self.k} {self.temperature} seed {self.seed}"


ONE_SAMPLE = Samples()
NUCLEUS = DecodingRule(0.6, top_p=0.95)


@dataclass(frozen=True)
class GenerationTask(Task):
    """A benchmark whose answers are generated."""

    normalization: str = PLAIN
    stops: tuple[str, ...] = ()
    max_tokens: int = 256
    separator: str = "\n\n"  # between a solved example and the next question
    answer: Callable[[str], str] = str.strip  # returns the normal form of the answer in a generated text
    runs_code: bool = False  # whether answers are programs
    alone: DecodingRule = GREEDY  # for one sample
    several: DecodingRule = NUCLEUS  # for more

    def rule(self, samples: Samples) -> DecodingRule:
        """Return how samples are drawn."""
        found = self.alone if samples.k == 1 and (self.runs_code or samples.count == 1) else self.several
        if samples.temperature is not None:
            found = replace(found, temperature=samples.temperature)
        return replace(found, seed=samples.seed)

    def metric(self, samples: Samples) -> str:
        """Return the name of what is measured."""
        if self.runs_code:
            return f"pass@{samples.k}"
        return f"maj@{samples.count}" if samples.count > 1 else "accuracy"


def _nq(line: Line) -> Question:
    return _closed_book(line["question"], line["answer"])


def _triviaqa(line: Line) -> Question:
    answer = line["answer"]
    return _closed_book(line["question"], [answer["value"], *answer["aliases"]])


def _closed_book(asked: str, answers: list[str]) -> Question:
    wanted = tuple(dict.fromkeys(plain_words(answer) for answer in answers))
    return question(f"Q: {asked}\nA:", f" {answers[0]}", wanted)


def _gsm8k(line: Line) -> Question:
    solution = re.sub(r"<<.*?>>", "", line["answer"])  # marks for a calculator
    return question(f"Question: {line['question']}\nAnswer:", f" {solution}", (final_number(line["answer"]),))


def _math(line: Line) -> Question:
    solution = line["solution"]
    return question(f"Problem:\n{line['problem']}\n\nSolution:", f" {solution}", (boxed_answer(solution),))


def _humaneval(line: Line) -> Question:
    behind = f"\n{line['test']}\ncheck({line['entry_point']})\n"
    return question(line["prompt"], line["canonical_solution"], program=(line["prompt"], behind))


def _mbpp(line: Line) -> Question:
    tests = "\n".join(line["test_list"])
    asked = (
        f"You are an expert Python programmer, and here is your task: {line['text']} Your code should pass these "
        f"tests:\n\n{tests}\n[BEGIN]\n"
    )
    code = line["code"].replace("\r\n", "\n")
    behind = f"\n{line['test_setup_code']}\n{tests}\n"
    # The paper's examples are like those of Austin et al. (2021): tasks 2, 3 and 4.
    group = "" if line["task_id"] == 1 else "shown"
    return question(asked, f"{code}\n[DONE]", program=("", behind), group=group)


NQ = GenerationTask(
    "nq", 1, _nq, shots=5, dataset="google-research-datasets/nq_open", subset="nq_open",
    heading=lambda group: "Answer these questions:\n", stops=("\n", ".", ","), max_tokens=32, separator="\n",
    answer=plain_words,
)  # fmt: skip
TRIVIAQA = replace(
    NQ, name="triviaqa", example=_triviaqa, dataset="mandarjoshi/trivia_qa", subset="rc.nocontext"
)  # fmt: skip
GSM8K = GenerationTask(
    "gsm8k", 1, _gsm8k, "test", shots=8, dataset="openai/gsm8k", subset="main",
    stops=("Question:", "\n\n"), answer=final_number,
)  # fmt: skip
MATH = GenerationTask(
    "math", 1, _math, "test", shots=4, dataset="DigitalLearningGmbH/MATH-lighteval",
    stops=("Problem:",), max_tokens=512, answer=boxed_answer,
)  # fmt: skip
HUMANEVAL = GenerationTask(
    "humaneval", 1, _humaneval, "test", "test", dataset="openai/openai_humaneval", subset="openai_humaneval",
    stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint"), max_tokens=512, runs_code=True,
    alone=DecodingRule(0.1), several=DecodingRule(0.8),
)  # fmt: skip
MBPP = replace(
    HUMANEVAL, name="mbpp", example=_mbpp, shot_split="prompt", shots=3, dataset="google-research-datasets/mbpp",
    subset="full", stops=("[DONE]",),
)  # fmt: skip
CLOSED_BOOK, MATHEMATICS, CODE = (NQ, TRIVIAQA), (GSM8K, MATH), (HUMANEVAL, MBPP)
