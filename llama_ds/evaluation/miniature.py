"""A suite that needs no download and shows progress in a model of a few million parameters: four tasks from a seed.

All but arithmetic compare how likely one completion is after several contexts, as WinoGrande does: how common a word or
a bracket is then plays no part, and what a small model learns first shows in the accuracy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from llama_ds.evaluation.choice_scores import PLAIN
from llama_ds.evaluation.tasks import Example, Task

COUNT = 200  # questions of each task
SHOWN = 100  # further examples of each, for showing before a question
SEED = 20230227
WORDS = (
    *("time", "name", "line", "file", "value", "list", "object", "error", "test", "path", "key", "node", "data"),
    *("type", "index", "size", "text", "state", "model", "number"),
)
NOUNS = (
    *("file", "list", "value", "name", "model", "test", "size", "result", "function", "error", "user", "system"),
    *("data", "process", "number", "code", "program", "page", "table", "book"),
)
# Phrases by the only one of these words that can follow them.
PHRASES: dict[str, tuple[str, ...]] = {
    "of": ("is part", "is one", "consists", "is made", "is a list", "is a copy", "is the end", "is the name"),
    "to": ("is equal", "belongs", "is similar", "refers", "corresponds", "is able", "applies", "is close"),
    "on": ("depends", "is based", "relies", "focuses", "is dependent"),
    "as": ("is known", "is the same", "is treated", "serves", "acts"),
    "than": ("is larger", "is greater", "is smaller", "is longer", "is better", "is less"),
    "with": ("is associated", "is compatible", "deals", "is consistent", "begins"),
    "by": ("is followed", "is multiplied", "is divided", "is preceded", "is surrounded"),
    "from": ("is different", "is derived", "differs", "is excluded", "inherits"),
    "in": ("results", "is interested", "is involved", "participates", "is contained"),
}
# Others, for the examples that are shown: they say nothing of those that are asked.
SHOWN_PHRASES: dict[str, tuple[str, ...]] = {
    "of": ("is a kind", "is the size"),
    "to": ("is due", "leads"),
    "on": ("is built", "insists"),
    "as": ("is defined", "counts"),
    "than": ("is older", "is more"),
    "with": ("is filled", "is familiar"),
    "by": ("is caused", "is given"),
    "from": ("is taken", "is far"),
    "in": ("is found", "is stored"),
}
BRACKETS = {"(": ")", "[": "]", "{": "}"}
CHOICES = 4


def _cloze(rng: random.Random, phrases: Mapping[str, Sequence[str]] = PHRASES) -> Example:
    """Find the phrase that a word follows."""
    words, noun = rng.sample(sorted(phrases), CHOICES), rng.choice(NOUNS)
    return _shuffled(rng, [f"The {noun} {rng.choice(phrases[word])}" for word in words], words[0])


def _copy(rng: random.Random) -> Example:
    """Find the list of words whose repetition continues with a word: the others have other words in its place."""
    words = rng.sample(WORDS, CHOICES + 4)
    others, place = words[CHOICES:], rng.randrange(1, 4)
    lists = [[*others[:place], word, *others[place:]] for word in words[:CHOICES]]
    return _shuffled(rng, [f"{' '.join(one)}\n{' '.join(one[:place])}" for one in lists], words[0])


def _arithmetic(rng: random.Random) -> Example:
    """Add two numbers."""
    a, b = rng.randrange(1, 31), rng.randrange(1, 31)
    wrong = rng.sample([n for n in range(max(2, a + b - 4), a + b + 5) if n != a + b], CHOICES - 1)
    choices = [str(a + b), *map(str, wrong)]
    rng.shuffle(choices)
    return Example((f"{a} + {b} =",) * CHOICES, tuple(choices), choices.index(str(a + b)))


def _brackets(rng: random.Random) -> Example:
    """Find the bracket that a bracket closes, with up to two closed pairs between them."""
    closed = []
    for _ in range(rng.randrange(3)):
        open_ = rng.choice(list(BRACKETS))
        closed.append(f"{rng.choice(WORDS)} {open_} {rng.choice(WORDS)} {BRACKETS[open_]} , ")
    before, after = f"{rng.choice(WORDS)} = {rng.choice(WORDS)}", f"{''.join(closed)}{rng.choice(WORDS)}"
    opens = rng.sample(list(BRACKETS), 3)
    return _shuffled(rng, [f"{before} {open_} {after}" for open_ in opens], BRACKETS[opens[0]])


def _shuffled(rng: random.Random, contexts: Sequence[str], completion: str) -> Example:
    """Return the question after which of the contexts, the first, the completion is likeliest."""
    order = list(contexts)
    rng.shuffle(order)
    return Example(tuple(order), (completion,) * len(order), order.index(contexts[0]))


MAKERS: dict[str, Callable[[random.Random], Example]] = {
    "mini_cloze": _cloze,
    "mini_copy": _copy,
    "mini_arithmetic": _arithmetic,
    "mini_brackets": _brackets,
}
SHOWN_MAKERS = MAKERS | {"mini_cloze": lambda rng: _cloze(rng, SHOWN_PHRASES)}
MINIATURE = tuple(Task(name, 3, lambda line: line["example"], normalization=PLAIN) for name in MAKERS)


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
    """Return what makes two questions one: the text that is right, in which a sum does not depend on the order."""
    words = example.solved.split(" ")
    return tuple(sorted(words) if "+" in words else words)
