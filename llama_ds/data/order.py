"""Which row comes when: integer arithmetic from (seed, index) to (source, epoch, row), at any index at one cost.

The rows of a run are numbered 0, 1, ...: step s reads the rows s * global_batch .. (s + 1) * global_batch. Nothing is
remembered from row to row, so a run resumed at step 300,000, on any number of ranks, reads what it would have read.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np

MIN_BLOCK = 1024  # rows over which the mixture is met to within one row per source
WINDOW = 8  # shards shuffled together: bounds the files open at a time
WEIGHT_ONE = 1 << 40  # weights as integers: exact at any row number


def permutation(n: int, *key: object) -> np.ndarray:
    """Return a permutation of range(n) that depends on `key` alone, on every machine and numpy version.

    It sorts raw Philox words: numpy promises the bit stream of a bit generator, not of Generator.permutation (NEP 19).
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return np.argsort(words, kind="stable")


class Order:
    """The order in which a run reads its sources.

    sources: (name, weight, rows of each shard). Weights are relative to their sum. In every block of rows each source
    gets its weight to within one row; inside a block sources are shuffled; each source gives every row once per epoch.
    """

    def __init__(self, seed: int, sources: Sequence[tuple[str, float, Sequence[int]]]) -> None:
        self._seed = int(seed)
        self._names = [name for name, _, _ in sources]
        weights = [weight for _, weight, _ in sources]
        if not sources or min(weights) <= 0 or any(sum(shards) <= 0 for _, _, shards in sources):
            raise ValueError("every source needs a weight above 0 and at least one row")
        self._edges = [0, *(round(w / sum(weights) * WEIGHT_ONE) for w in accumulate(weights))]
        self._edges[-1] = WEIGHT_ONE
        # A source's share of a block must be two rows or more, else rounding could take a row back in the next block.
        smallest = min(b - a for a, b in pairwise(self._edges))
        self._block = max(MIN_BLOCK, 1 << (2 * WEIGHT_ONE // max(1, smallest)).bit_length())
        self._sources = [SourceOrder(self._seed, name, shards) for name, _, shards in sources]
        self._mixed = lru_cache(maxsize=2)(self._mix_block)

    def at(self, step: int, global_batch: int, dp_rank: int = 0, dp_size: int = 1) -> list[tuple[int, int, int]]:
        """Return what one data-parallel rank reads in `step`: the dp_rank-th of dp_size equal runs of its rows."""
        share = global_batch // dp_size
        return self.rows(step * global_batch + dp_rank * share, share)

    def rows(self, start: int, count: int) -> list[tuple[int, int, int]]:
        """Return (source index, epoch, row) of the rows numbered start .. start + count."""
        return [self._row(index) for index in range(start, start + count)]

    def epochs(self, after_rows: int) -> dict[str, float]:
        """Return how many times each source has been read after the first `after_rows` rows."""
        block, inside = divmod(after_rows, self._block)
        labels, _ = self._mixed(block)
        inside_block = np.bincount(labels[:inside], minlength=len(self._names))
        counts = [before + int(more) for before, more in zip(self._counts(block), inside_block, strict=True)]
        return {
            name: count / source.rows for name, count, source in zip(self._names, counts, self._sources, strict=True)
        }

    def _row(self, index: int) -> tuple[int, int, int]:
        block, inside = divmod(index, self._block)
        labels, numbers = self._mixed(block)
        source = int(labels[inside])
        return source, *self._sources[source].row(int(numbers[inside]))

    def _counts(self, block: int) -> list[int]:
        # Rows of each source before `block`: differences of rounded cumulative weights, so they add up exactly.
        rows = block * self._block
        edges = [(rows * edge + WEIGHT_ONE // 2) // WEIGHT_ONE for edge in self._edges]
        return [b - a for a, b in pairwise(edges)]

    def _mix_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        # labels: the source of each row of the block; numbers: how many rows of that source come before, ever.
        before, after = self._counts(block), self._counts(block + 1)
        sizes = [b - a for a, b in zip(before, after, strict=True)]
        labels = np.repeat(np.arange(len(sizes)), sizes)[permutation(self._block, self._seed, "mixture", block)]
        numbers = np.empty(self._block, np.int64)
        for source, (first, size) in enumerate(zip(before, sizes, strict=True)):
            numbers[labels == source] = np.arange(first, first + size)
        return labels, numbers


class SourceOrder:
    """The order of one source: per epoch shards are shuffled, then rows over WINDOW shards at a time."""

    def __init__(self, seed: int, name: str, shard_rows: Sequence[int]) -> None:
        self.rows = sum(shard_rows)
        self._key = (seed, name)
        self._shard_rows = np.array(shard_rows, np.int64)
        self._shard_first = np.cumsum(self._shard_rows) - self._shard_rows
        self._epoch = lru_cache(maxsize=2)(self._shuffle_shards)
        self._window = lru_cache(maxsize=2)(self._shuffle_window)

    def row(self, n: int) -> tuple[int, int]:
        """Return (epoch, row of the source) of the n-th row that is read from it."""
        epoch, n = divmod(n, self.rows)
        _, starts = self._epoch(epoch)
        window = bisect_right(starts, n) - 1
        return epoch, int(self._window(epoch, window)[n - starts[window]])

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        shards = permutation(len(self._shard_rows), *self._key, "shards", epoch)
        sizes = np.add.reduceat(self._shard_rows[shards], np.arange(0, len(shards), WINDOW))
        return shards, [0, *accumulate(sizes[:-1].tolist())]

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        shards = self._epoch(epoch)[0][window * WINDOW : (window + 1) * WINDOW]
        rows = np.concatenate([self._shard_first[s] + np.arange(self._shard_rows[s]) for s in shards])
        return rows[permutation(len(rows), *self._key, "rows", epoch, window)]
