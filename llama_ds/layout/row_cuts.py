"""Which tokens of a row each context-parallel rank holds, and which blocks of attention it computes.

Attention is causal, so late tokens cost more than early ones. For a ring of n ranks, a row of T tokens is cut into 2 n
chunks, and rank r holds chunks r and 2 n - 1 - r, which together cost the same on all ranks (zigzag). At step s of the
ring, rank r has the keys of rank r - s. With all-to-alls, a rank holds an n-th of the row, and computes whole rows.
"""

from __future__ import annotations

from typing import NamedTuple

from llama_ds.config.context_parallel import RING


def own_ranges(tokens: int, rank: int, size: int, method: str) -> tuple[range, ...]:
    """Return the positions that a rank of `size` holds of a row of `tokens`, in order.

    Raises:
        ValueError: `size`, times 2 for the ring, does not divide `tokens`.
    """
    parts = 2 * size if method == RING else size
    if tokens % parts:
        raise ValueError(f"{tokens} tokens of a row are not a multiple of {parts}")
    length = tokens // parts
    chunks = (rank, parts - 1 - rank) if method == RING else (rank,)
    return tuple(range(chunk * length, (chunk + 1) * length) for chunk in chunks)


def causal_imbalance(tokens: int, size: int, method: str) -> float:
    """Return the causal work of the busiest of `size` ranks over their mean, less 1, for a row of one document.

    With all-to-alls, every rank computes whole rows of equally many heads.
    """
    if method != RING:
        return 0.0
    work = [
        sum((part.start + part.stop + 1) * len(part) // 2 for part in own_ranges(tokens, rank, size, method))
        for rank in range(size)
    ]
    return max(work) * size / sum(work) - 1


class RingBlock(NamedTuple):
    """A step of the ring on one rank: which of its queries meet which of the keys at hand."""

    source: int  # rank to which the keys belong
    queries: slice
    keys: slice
    causal: bool  # False: every query sees every key


def ring_block(length: int, rank: int, size: int, step: int) -> RingBlock:
    """Return what a rank with `length` tokens computes at a step of the ring, counted from 0.

    Keys of an earlier rank: their first chunk is before both of this rank's chunks, their last one after both. Keys of
    a later rank: both chunks are after this rank's first chunk and before its last one.
    """
    source, half = (rank - step) % size, length // 2
    whole = slice(0, length)
    if step == 0:
        return RingBlock(source, whole, whole, True)
    if source < rank:
        return RingBlock(source, whole, slice(0, half), False)
    return RingBlock(source, slice(half, length), whole, False)
