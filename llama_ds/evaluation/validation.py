"""Losses on validation rows by source: in nats per token, and in bits per byte, comparable between tokenizers.

Shapes: R rows of T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from itertools import islice

import numpy as np

from llama_ds.data.sources import Sources
from llama_ds.data.text.tokenizer import Tokenizer

OVERFLOWS = 700.0  # nats, just below the logarithm of the largest float


@dataclass(frozen=True, eq=False)
class ValidationRows:
    """Validation rows of one source, int64 (R, T + 1), with marked filler, and the bytes of their labels' text."""

    source: str
    rows: np.ndarray
    text_bytes: int


@dataclass(frozen=True)
class ValidationLoss:
    """The loss of a model on rows: labels are tokens, bos and eos among them; bytes are those of the text."""

    rows: int
    labels: int
    text_bytes: int
    nats: float  # summed over the labels

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.labels

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < OVERFLOWS else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text; None: the rows hold no text."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None

    @property
    def values(self) -> dict[str, float | None]:
        """The loss in nats per token, its perplexity, bits per byte, and the rows and tokens that count."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "rows": self.rows,
            "tokens": self.labels,
        }

    def __add__(self, other: ValidationLoss) -> ValidationLoss:
        return ValidationLoss(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def total(losses: Iterable[ValidationLoss]) -> ValidationLoss:
    """Return the loss on the rows of all sources."""
    return sum(losses, ValidationLoss(0, 0, 0, 0.0))


def rows_by_source(sources: Sources, count: int) -> list[ValidationRows]:
    """Return the first `count` validation rows by source, without sources that have none of them."""
    every, found = iter(sources.validation_rows(count)), []
    for source, share in zip(sources.config.sources, sources.validation_shares(count), strict=True):
        if share:
            rows = np.stack(list(islice(every, share)))
            found.append(ValidationRows(source.name, rows, text_bytes(rows, sources.tokenizer)))
    return found


def text_bytes(rows: np.ndarray, tokenizer: Tokenizer) -> int:
    """Return the UTF-8 bytes of the text of the labels of consecutive marked rows (R, T + 1).

    Documents are decoded whole, because characters may be cut at the end of a row. bos and eos are no text.
    """
    labels = rows[:, 1:].ravel()
    labels = labels[labels >= 0]
    marks = [mark for mark in (tokenizer.bos_id, tokenizer.eos_id) if mark is not None]
    documents = np.split(labels, np.flatnonzero(np.isin(labels, marks)))
    return sum(len(tokenizer.decode(ids).encode("utf-8", "replace")) for ids in documents)
