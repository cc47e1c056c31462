"""Exact deduplication of documents by their digests, with 16 to 32 bytes of memory per document."""

from __future__ import annotations

import numpy as np

from llama_ds.data.source.documents_index import DIGEST_BYTES

DIGEST = np.dtype(f"S{DIGEST_BYTES}")  # compared bytewise; numpy strips trailing zeros, which is unambiguous


class DigestSet:
    """A set of digests in sorted arrays, each less than half as long as the previous one, as in an LSM tree."""

    def __init__(self) -> None:
        self._levels: list[np.ndarray] = []

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add digests; return the ascending indices of those that duplicate a known digest or an earlier one."""
        unique, first = np.unique(digests, return_index=True)
        new = np.ones(len(unique), bool)
        for level in self._levels:
            at = np.minimum(np.searchsorted(level, unique), len(level) - 1)
            new &= level[at] != unique
        self._push(unique[new])
        is_copy = np.ones(len(digests), bool)
        is_copy[first[new]] = False
        return np.flatnonzero(is_copy)

    def _push(self, level: np.ndarray) -> None:
        if not len(level):
            return
        while self._levels and len(self._levels[-1]) <= 2 * len(level):
            level = np.concatenate([self._levels.pop(), level])
            level.sort(kind="stable")  # timsort merges the two sorted runs
        self._levels.append(level)
