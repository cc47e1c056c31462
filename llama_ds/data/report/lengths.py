"""The distribution of document lengths in constant memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EXACT = 1024  # lengths below have a bin each
PER_OCTAVE = 256  # bins from n to 2 n above: a quantile is at most 0.3 % too small
OCTAVES = 40
BARS = 2  # bars per octave in a histogram


@dataclass(frozen=True)
class Bar:
    """Documents of lengths `start` <= n < `stop`."""

    start: int
    stop: int
    documents: int
    tokens: int


class Lengths:
    """Counts of document lengths, in tokens."""

    def __init__(self) -> None:
        bins = EXACT + PER_OCTAVE * OCTAVES
        self._documents, self._tokens = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
        self.shortest, self.longest = 0, 0

    def add(self, lengths: np.ndarray) -> None:
        """Add documents."""
        if not len(lengths):
            return
        low = int(lengths.min())
        self.shortest = min(self.shortest, low) if self.documents else low
        self.longest = max(self.longest, int(lengths.max()))
        above = EXACT + np.floor(np.log2(np.maximum(lengths, EXACT) / EXACT) * PER_OCTAVE).astype(np.int64)
        index = np.where(lengths < EXACT, lengths, above)
        np.add.at(self._documents, index, 1)
        np.add.at(self._tokens, index, lengths)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self._documents.sum())

    @property
    def tokens(self) -> int:
        """Total length."""
        return int(self._tokens.sum())

    def quantile(self, share: float) -> int:
        """Return the length that `share` of the documents do not exceed."""
        reached = np.searchsorted(np.cumsum(self._documents), max(1, np.ceil(share * self.documents)))
        return min(max(_edge(int(reached)), self.shortest), self.longest)

    def bars(self) -> list[Bar]:
        """Return a histogram with lengths on a logarithmic scale, from the first bar with documents to the last."""
        edges = np.unique(np.ceil(2 ** (np.arange(1, BARS * OCTAVES + 1) / BARS)).astype(np.int64))
        bins = np.array([_edge(i) for i in range(len(self._documents))])
        at = np.searchsorted(edges, bins, "right") - 1
        documents = np.bincount(np.maximum(at, 0), self._documents, len(edges)).astype(np.int64)
        tokens = np.bincount(np.maximum(at, 0), self._tokens, len(edges)).astype(np.int64)
        filled = np.flatnonzero(documents)
        return (
            [
                Bar(int(edges[i]), int(edges[i + 1]), int(documents[i]), int(tokens[i]))
                for i in range(filled[0], filled[-1] + 1)
            ]
            if len(filled)
            else []
        )


def _edge(index: int) -> int:
    """Return the smallest length in a bin."""
    return index if index < EXACT else int(np.ceil(EXACT * 2 ** ((index - EXACT) / PER_OCTAVE)))
