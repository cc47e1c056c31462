"""What a step of the ring computes of rows with several documents: only blocks in which a query sees a key.

Rank r of n holds the tokens r, r + n, r + 2 n, ... of a row: its i-th token is at position i n + r. It sees the j-th
token of rank s if both are of one document and j <= i - shift, where shift is 1 for s > r, else 0. A document at
positions b .. e - 1 thus leaves one causal square: the keys j from ceil((b - s) / n) up to below
ceil((e - r) / n) - shift, and the queries of the same numbers plus shift. Squares of a row do not overlap, so those of
a step are sequences for one call of a kernel for packed documents (`model/ring_blocks.py`). Where there is no such
kernel, a long document is a causal block, and short ones that follow each other share a block with a mask of at most
`TILE` x `TILE` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

TILE = 256  # tokens of short documents that share a block


class RingStep(NamedTuple):
    """A step of a striped ring on one rank."""

    rank: int
    source: int  # rank to which the keys belong
    size: int
    length: int  # tokens of a row on a rank

    @property
    def shift(self) -> int:
        """The number of the first query less that of the first key, in every square."""
        return 1 if self.source > self.rank else 0

    def squares(self, begins: Sequence[int]) -> Iterator[range]:
        """Yield the keys of the documents that leave a square; `begins` are the positions of a row's documents."""
        for begin, end in pairwise((*begins, self.length * self.size)):
            first, last = -((self.source - begin) // self.size), -((self.rank - end) // self.size) - self.shift
            if first < last:
                yield range(first, last)


class Piece(NamedTuple):
    """A block of attention: which queries of a rank meet which of the keys at hand, in some of the rows."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool  # False: every query sees every key
    masked: bool = False  # whether several documents share the block


def pieces_of(step: RingStep, begins: Sequence[Sequence[int]]) -> list[Piece]:
    """Return the blocks of a step; `begins` has of each row the positions at which its documents begin."""
    every = [list(_of_row(step, documents)) for documents in begins]
    if all(found == every[0] and not any(masked for _, masked in found) for found in every):
        return [_piece(step, slice(0, len(every)), *found) for found in every[0]]
    return [_piece(step, slice(row, row + 1), *one) for row, found in enumerate(every) for one in found]


def _piece(step: RingStep, rows: slice, keys: range, masked: bool) -> Piece:
    queries = slice(keys.start + step.shift, keys.stop + step.shift)
    return Piece(rows, queries, slice(keys.start, keys.stop), True, masked)


def _of_row(step: RingStep, documents: Sequence[int]) -> Iterator[tuple[range, bool]]:
    """Yield the keys of each block of a row, and whether it has several documents."""
    held, masked = range(0), False
    for square in step.squares(documents):
        if held and square.stop - held.start > TILE:
            yield held, masked
            held, masked = square, False
        else:
            held, masked = (range(held.start, square.stop), True) if held else (square, False)
    if held:
        yield held, masked
