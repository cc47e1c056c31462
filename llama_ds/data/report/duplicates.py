"""Exact duplicates among any number of documents, in bounded memory.

The digests of texts are hashes, so the texts whose digest ends in k zero bits are a uniform sample of all texts, with
every copy of each. k starts at 0, which counts exactly, and grows when the sample becomes too large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SAMPLED_TEXTS = 1 << 19


@dataclass(frozen=True)
class Copies:
    """A text that several documents have."""

    documents: int
    place: str  # file, or file:line, of its second document


class DigestSample:
    """The sampled texts of a source, with the number of documents that have each."""

    def __init__(self, limit: int = SAMPLED_TEXTS) -> None:
        self._limit, self._mask = limit, 0
        self._documents: dict[int, int] = {}
        self._place: dict[int, str] = {}

    def add(self, digest: bytes, place: str) -> None:
        """Add a document."""
        key = int.from_bytes(digest[:8], "little")
        if key & self._mask:
            return
        count = self._documents.get(key, 0) + 1
        self._documents[key] = count
        if count == 2:
            self._place[key] = place
        if len(self._documents) > self._limit:
            self._thin()

    @property
    def share_of_texts(self) -> float:
        """Expected share of all texts that the sample holds; 1: it is exact."""
        return 1 / (self._mask + 1)

    @property
    def share_of_copies(self) -> float:
        """Share of the documents whose text an earlier document has."""
        total = sum(self._documents.values())
        return (total - len(self._documents)) / total if total else 0.0

    def most_copied(self, count: int) -> list[Copies]:
        """Return the texts with the most documents."""
        found = sorted(self._place, key=lambda key: (-self._documents[key], self._place[key]))
        return [Copies(self._documents[key], self._place[key]) for key in found[:count]]

    def share_in(self, others: Sequence[DigestSample]) -> float:
        """Share of the documents whose text one of the `others` has too."""
        mask = max((sample._mask for sample in (self, *others)), default=0)
        own = {key: count for key, count in self._documents.items() if not key & mask}
        both = sum(count for key, count in own.items() if any(key in other._documents for other in others))
        return both / sum(own.values()) if own else 0.0

    def _thin(self) -> None:
        self._mask = 2 * self._mask + 1
        self._documents = {key: count for key, count in self._documents.items() if not key & self._mask}
        self._place = {key: place for key, place in self._place.items() if not key & self._mask}
