"""A suite that needs no download and shows progress in a model of a few million parameters: four tasks from a seed."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Sequence

from llama_ds.evaluation.tasks import Example, Task

COUNT = 200  # questions of each task
SHOWN = 100  # further examples of each, for showing before a question
SEED = 20230227
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
NUMBERS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
STEPS, SHOWN_STEPS = (1, 2, 3, 5, 10), (4, 7, 25, 100)  # sequences of numbers; a shown one says nothing of those asked
RANGE = 40  # numbers of a sequence
WORDS = (
    "time",
    "name",
    "line",
    "file",
    "value",
    "list",
    "object",
    "error",
    "test",
    "path",
    "key",
    "node",
    "data",
    "type",
)
BRACKETS = {"(": ")", "[": "]", "{": "}"}
CHOICES = 4


def _cloze(rng: random.Random, sequences: Sequence[Sequence[str]] | None = None) -> Example:
    """Continue a well-known sequence."""
    words = rng.choice(sequences or SEQUENCES)
    start = rng.randrange(len(words) - 3)
    wrong = rng.sample([word for word in dict.fromkeys(words) if word not in words[start : start + 4]], 3)
    return _shuffled(rng, f"{words[start]}, {words[start + 1]}, {words[start + 2]},", words[start + 3], wrong)


def _numbers(steps: Sequence[int]) -> Iterator[Sequence[str]]:
    """Yield the multiples of each step, upwards and downwards."""
    for step in steps:
        up = [str(number) for number in range(step, step * (RANGE + 1), step)]
        yield from (up, up[::-1])


_NAMED = [*DAYS, *DAYS[:3]], [*MONTHS, *MONTHS[:3]], NUMBERS, string.ascii_lowercase
SEQUENCES = (*_NAMED, *(words[::-1] for words in _NAMED), *_numbers(STEPS))
SHOWN_SEQUENCES = tuple(_numbers(SHOWN_STEPS))


def _copy(rng: random.Random) -> Example:
    """Repeat a list of words."""
    words = rng.sample(WORDS, 5)
    at = rng.randrange(1, 5)
    wrong = [word for word in words if word not in (words[at], words[at - 1])]
    return _shuffled(rng, f"{' '.join(words)}\n{' '.join(words[:at])}", words[at], wrong)


def _arithmetic(rng: random.Random) -> Example:
    """Add two numbers."""
    a, b = rng.randrange(1, 31), rng.randrange(1, 31)
    wrong = rng.sample([n for n in range(max(2, a + b - 4), a + b + 5) if n != a + b], 3)
    return _shuffled(rng, f"{a} + {b} =", str(a + b), [str(n) for n in wrong])


def _brackets(rng: random.Random) -> Example:
    """Close the innermost open bracket."""
    text: list[str] = []
    open_: list[str] = []
    for _ in range(rng.randrange(3, 12)):
        if len(open_) > 1 and rng.random() < 0.4:
            text.append(BRACKETS[open_.pop()])
        else:
            open_.append(rng.choice(list(BRACKETS)))
            text.append(open_[-1])
    right = BRACKETS[open_[-1]]
    return _shuffled(rng, " ".join(text), right, [mark for mark in BRACKETS.values() if mark != right])


def _shuffled(rng: random.Random, context: str, right: str, wrong: list[str]) -> Example:
    choices = [right, *wrong][:CHOICES]
    rng.shuffle(choices)
    return Example((context,) * len(choices), tuple(choices), choices.index(right))


MAKERS: dict[str, Callable[[random.Random], Example]] = {
    "mini_cloze": _cloze,
    "mini_copy": _copy,
    "mini_arithmetic": _arithmetic,
    "mini_brackets": _brackets,
}
SHOWN_MAKERS = MAKERS | {"mini_cloze": lambda rng: _cloze(rng, SHOWN_SEQUENCES)}
MINIATURE = tuple(Task(name, 2, lambda line: line["example"]) for name in MAKERS)


def examples(name: str, shown: bool = False, seed: int = SEED) -> list[Example]:
    """Return the questions of a task of the suite, or the examples that are shown before them.

    No question repeats, so that their outcomes are independent, and no example shown answers one.
    """
    rng = random.Random(f"{name} {seed}")
    distinct: dict[tuple[str, ...], Example] = {}
    for make, count in ((MAKERS[name], COUNT), (SHOWN_MAKERS[name], COUNT + SHOWN)):
        while len(distinct) < count:
            example = make(rng)
            distinct.setdefault(_question(example), example)
    made = list(distinct.values())
    return made[COUNT:] if shown else made[:COUNT]


def _question(example: Example) -> tuple[str, ...]:
    """Return what makes two questions one: the context, in which a sum does not depend on the order."""
    words = example.contexts[0].split(" ")
    return tuple(sorted(words) if "+" in words else words)
