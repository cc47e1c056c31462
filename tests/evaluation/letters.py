"""A tokenizer of letters for tests: one id for each character, in a vocabulary of 96 ids."""

from __future__ import annotations

import random
from collections.abc import Sequence

from llama_ds.config.document_marks import DocumentMarks
from llama_ds.evaluation.generation import GenerationRequest
from llama_ds.evaluation.requests import ScoringRequest
from llama_ds.model.decoding_rule import GREEDY, DecodingRule

TEXT = "the quick brown fox jumps over the lazy dog and runs away from the bear that sleeps in the old wood"


class Letters:
    """As much of a tokenizer as evaluation needs; ids 3 to 95 are characters."""

    path = "letters.model"
    bos_id: int | None = 1
    eos_id = 2

    def encode(self, text: str) -> list[int]:
        """Return an id for each character."""
        return [3 + ord(character) % 93 for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return a character for each id but bos and eos: 33 to 125 in ASCII, the space moved to "}"."""
        return "".join(chr(33 + (i - 3 - 33) % 93) for i in ids if i > 2)

    @property
    def marks(self) -> DocumentMarks:
        """The ids that mark documents."""
        return DocumentMarks(self.bos_id, self.eos_id)


def some_requests(count: int, longest: int) -> list[ScoringRequest]:
    """Return requests of many lengths, of up to `longest` characters, with and without a context; two are equal."""
    rng = random.Random(3)
    found = [
        ScoringRequest("", "fox"),
        ScoringRequest("the ", "dog"),
        ScoringRequest("the ", "dog"),
        ScoringRequest(TEXT, " and"),
        *(ScoringRequest(TEXT[:20], choice) for choice in (" fox", " four foxes", " f", TEXT[20:26])),
    ]
    while len(found) < count:
        length, scored = rng.randrange(2, longest), rng.randrange(1, 9)
        start = rng.randrange(len(TEXT) - length)
        cut = max(0, length - scored)
        found.append(ScoringRequest(TEXT[start : start + cut], TEXT[start + cut : start + length]))
    return found


def some_prompts() -> list[GenerationRequest]:
    """Return contexts of many lengths for rows of 32 tokens, continued greedily, and drawn."""
    drawn = DecodingRule(temperature=0.8, top_p=0.95, seed=3)
    return [
        GenerationRequest(TEXT[:length], ("x",), 9, rule)
        for rule in (GREEDY, drawn)
        for length in (0, 1, 5, 12, 13, 40)
    ]
