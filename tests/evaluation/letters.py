"""A tokenizer of letters for tests: one id for each character, in a vocabulary of 96 ids."""

from __future__ import annotations

import random

from llama_ds.evaluation.requests import ScoringRequest

TEXT = "the quick brown fox jumps over the lazy dog and runs away from the bear that sleeps in the old wood"


class Letters:
    """As much of a tokenizer as scoring needs; ids 3 to 95 are characters."""

    path = "letters.model"
    bos_id: int | None = 1
    eos_id = 2

    def encode(self, text: str) -> list[int]:
        """Return an id for each character."""
        return [3 + ord(character) % 93 for character in text]


def some_requests(count: int, longest: int) -> list[ScoringRequest]:
    """Return requests of many lengths, of up to `longest` characters, with and without a context; two are equal."""
    rng = random.Random(3)
    found = [
        ScoringRequest("", "fox"),
        ScoringRequest("the ", "dog"),
        ScoringRequest("the ", "dog"),
        ScoringRequest(TEXT, " and"),
    ]
    while len(found) < count:
        length, scored = rng.randrange(2, longest), rng.randrange(1, 9)
        start = rng.randrange(len(TEXT) - length)
        cut = max(0, length - scored)
        found.append(ScoringRequest(TEXT[start : start + cut], TEXT[start + cut : start + length]))
    return found
