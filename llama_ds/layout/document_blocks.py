"""What a step of the ring computes of rows with several documents: only blocks in which a query sees a key.

A query of a later chunk sees keys of an earlier one only if no document begins between them. So of two chunks of a row,
the queries before the first document that begins in the later chunk see the keys from the last document that begins at
or before it: a block without a mask, or nothing. Within a chunk, a long document is a causal block, and short ones that
follow each other share a block with a mask of at most `TILE` x `TILE` tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from llama_ds.layout.row_cuts import RingBlock

TILE = 256  # tokens of short documents that share a block


class Piece(NamedTuple):
    """A block of attention: which queries of a rank meet which of the keys at hand, in some of the rows."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool  # False: every query sees every key
    begins: int | None = None  # position of the block's first token in the row, if several documents share the block


def pieces_of(block: RingBlock, rank: int, size: int, length: int, begins: Sequence[Sequence[int]]) -> list[Piece]:
    """Return the blocks of a ring's step for a rank with `length` tokens of a row; those within a chunk are first.

    `begins` has of each row the positions at which its documents begin, in order, the first of which is 0.
    """
    half = length // 2
    own, other = (rank, 2 * size - 1 - rank), (block.source, 2 * size - 1 - block.source)
    within: list[Piece] = []
    across: list[Piece] = []
    for row, documents in enumerate(begins):
        rows = slice(row, row + 1)
        for number, chunk in enumerate(own):
            if block.source == rank:
                within += _within(rows, number * half, chunk * half, half, documents)
            for other_number, earlier in enumerate(other):
                if earlier < chunk:
                    across += _across(rows, (number, other_number), (chunk, earlier), half, documents)
    return [*_together(within, len(begins)), *_together(across, len(begins))]


def _within(rows: slice, local: int, first: int, tokens: int, begins: Sequence[int]) -> Iterator[Piece]:
    """Yield the blocks of a chunk's own keys; the chunk begins at position `first`, and at `local` on its rank."""
    end = first + tokens
    inside = begins[bisect_right(begins, first) : bisect_left(begins, end)]
    at, several = first, False
    for begin, following in pairwise((first, *inside, end)):
        if begin > at and following - at > TILE:
            yield _diagonal(rows, local - first, at, begin, several)
            at, several = begin, False
        several = several or begin > at
    yield _diagonal(rows, local - first, at, end, several)


def _diagonal(rows: slice, shift: int, first: int, end: int, several: bool) -> Piece:
    tokens = slice(first + shift, end + shift)
    return Piece(rows, tokens, tokens, True, first if several else None)


def _across(
    rows: slice, numbers: tuple[int, int], chunks: tuple[int, int], tokens: int, begins: Sequence[int]
) -> Iterator[Piece]:
    """Yield the block of a chunk's queries and an earlier chunk's keys; `numbers` are those on their ranks."""
    first, earlier = (chunk * tokens for chunk in chunks)
    found = bisect_right(begins, first)
    document, following = begins[found - 1], min([*begins[found : found + 1], first + tokens])
    hidden = max(0, document - earlier)
    if hidden < tokens:
        queries, keys = (number * tokens for number in numbers)
        seeing = min(following - first, tokens)
        yield Piece(rows, slice(queries, queries + seeing), slice(keys + hidden, keys + tokens), False)


def _together(pieces: list[Piece], rows: int) -> list[Piece]:
    """Compute in one call what is the same block in every row."""
    first = [piece._replace(rows=slice(0, rows)) for piece in pieces if piece.rows.start == 0]
    same = rows > 1 and all(piece.begins is None for piece in pieces) and len(pieces) == rows * len(first)
    if same and all(a._replace(rows=slice(0, rows)) == b for a, b in zip(pieces, first * rows, strict=True)):
        return first
    return pieces
