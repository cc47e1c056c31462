"""The multiple-choice benchmarks of the LLaMA paper (arXiv 2302.13971, section 3), each from lines of its data set.

The paper says how completions are normalized and how many examples are shown, and not how questions are written: the
wording is that of lm-evaluation-harness, except RACE. docs/evaluation.md has the choices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_ds.evaluation.tasks import Example, Task

Line = Mapping[str, Any]


def _same_context(context: str, completions: Sequence[str], gold: int, group: str = "") -> Example:
    return Example((context,) * len(completions), tuple(completions), gold, group)


def _boolq(line: Line) -> Example:
    question = line["question"].rstrip("?")
    return _same_context(f"{line['passage']}\nQuestion: {question}?\nAnswer:", ("no", "yes"), int(line["answer"]))


def _piqa(line: Line) -> Example:
    return _same_context(f"Question: {line['goal']}\nAnswer:", (line["sol1"], line["sol2"]), int(line["label"]))


def _social_iqa(line: Line) -> Example:
    choices = [line[f"answer{letter}"] for letter in "ABC"]
    return _same_context(f"Q: {line['context']} {line['question']}\nA:", choices, int(line["label"]) - 1)


def _hellaswag(line: Line) -> Example:
    begun = f"{line['activity_label']}: {line['ctx_a']} {line['ctx_b'].capitalize()}"
    return _same_context(_without_marks(begun), [_without_marks(e) for e in line["endings"]], int(line["label"]))


def _without_marks(text: str) -> str:
    """Return a text of WikiHow without its marks, such as [header]; spaces beside them stay, as in the harness."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _winogrande(line: Line) -> Example:
    """Compare how likely the rest of the sentence is after each name (Trinh and Le 2018)."""
    before, _, rest = line["sentence"].partition("_")
    return Example(tuple(before + line[f"option{n}"] for n in (1, 2)), (rest.strip(),) * 2, int(line["answer"]) - 1)


def _arc(line: Line) -> Example:
    labels = list(line["choices"]["label"])
    context = f"Question: {line['question']}\nAnswer:"
    return _same_context(context, line["choices"]["text"], labels.index(line["answerKey"]))


def _openbookqa(line: Line) -> Example:
    labels = list(line["choices"]["label"])
    return _same_context(line["question_stem"], line["choices"]["text"], labels.index(line["answerKey"]))


def _race(line: Line) -> Example:
    context = f"{line['article']}\n\nQuestion: {line['question']}\nAnswer:"
    return _same_context(context, line["options"], "ABCD".index(line["answer"]))


def _mmlu(line: Line) -> Example:
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", line["choices"], strict=True))
    context = f"{line['question'].strip()}\n{choices}\nAnswer:"
    return _same_context(context, tuple("ABCD"), int(line["answer"]), line["subject"])


def _mmlu_heading(subject: str) -> str:
    words = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {words}.\n\n"


COMMON_SENSE = (
    Task("boolq", 1, _boolq, normalization="answer", dataset="google/boolq"),
    Task("piqa", 1, _piqa, dataset="ybisk/piqa"),
    Task("social_iqa", 1, _social_iqa, dataset="allenai/social_i_qa"),
    Task("hellaswag", 2, _hellaswag, dataset="Rowan/hellaswag"),
    Task("winogrande", 1, _winogrande, dataset="allenai/winogrande", subset="winogrande_xl"),
    Task("arc_easy", 1, _arc, split="test", dataset="allenai/ai2_arc", subset="ARC-Easy"),
    Task("arc_challenge", 1, _arc, split="test", dataset="allenai/ai2_arc", subset="ARC-Challenge"),
    Task("openbookqa", 1, _openbookqa, "test", normalization="answer", dataset="allenai/openbookqa", subset="main"),
)
RACE = tuple(
    Task(f"race_{part}", 2, _race, "test", normalization="answer", dataset="ehovy/race", subset=part)
    for part in ("middle", "high")
)
MMLU = Task(
    "mmlu", 1, _mmlu, "test", shot_split="dev", shots=5, normalization="plain", dataset="cais/mmlu", subset="all",
    heading=_mmlu_heading,
)  # fmt: skip
PAPER = (*COMMON_SENSE, *RACE, MMLU)
