"""A suite that needs no download and shows progress in a model of a few million parameters: four tasks from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable

from llama_ds.evaluation.tasks import Example, Task

COUNT = 200  # examples of each task
SEED = 20230227
SEQUENCES = (
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November"),
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m"),
    tuple(str(number) for number in range(1, 40)),
)
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


def _cloze(rng: random.Random) -> Example:
    """Continue a well-known sequence."""
    words = rng.choice(SEQUENCES)
    start = rng.randrange(len(words) - 3)
    wrong = rng.sample([word for word in words if word not in words[start : start + 4]], 3)
    return _shuffled(rng, f"{words[start]}, {words[start + 1]}, {words[start + 2]},", words[start + 3], wrong)


def _copy(rng: random.Random) -> Example:
    """Repeat a list of words."""
    words = rng.sample(WORDS, 5)
    at = rng.randrange(1, 5)
    wrong = [word for word in words if word not in (words[at], words[at - 1])]
    return _shuffled(rng, f"{' '.join(words)}\n{' '.join(words[:at])}", words[at], wrong)


def _arithmetic(rng: random.Random) -> Example:
    """Add two digits."""
    a, b = rng.randrange(1, 10), rng.randrange(1, 10)
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
MINIATURE = tuple(Task(name, 1, lambda line: line["example"]) for name in MAKERS)


def examples(name: str, count: int = COUNT, seed: int = SEED) -> list[Example]:
    """Return the examples of a task of the suite; those of another seed are shown before questions."""
    rng = random.Random(f"{name} {seed}")
    return [MAKERS[name](rng) for _ in range(count)]
