"""The ids that mark where a document begins and ends among packed ids.

<s> document </s> <s> document </s>       a tokenizer with a bos of its own
document <|endoftext|> document <|endoftext|>    one without a bos, or whose bos is its eos (GPT-NeoX, SmolLM)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DocumentMarks:
    """A tokenizer's bos, if it has one, and its eos."""

    bos: int | None
    eos: int

    @property
    def begin(self) -> int | None:
        """The id before every document; None: a document begins after the eos of the one before."""
        return None if self.bos == self.eos else self.bos

    @property
    def count(self) -> int:
        """Number of ids that packing adds to each document."""
        return 1 if self.begin is None else 2


# Of LLaMA's sentencepiece tokenizer; for dry runs and measurements, which have no tokenizer.
LLAMA_MARKS = DocumentMarks(1, 2)
