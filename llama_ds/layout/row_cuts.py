"""Which tokens of a row each context-parallel rank holds, and which blocks of attention it computes.

Attention is causal, so late tokens cost more than early ones. For a ring of n ranks, a row of T tokens is cut into 2 n
chunks, and rank r holds chunks r and 2 n - 1 - r, which together cost the same on all ranks (zigzag). With document
masks chunks would differ by where documents begin, so rank r holds the tokens r, r + n, r + 2 n, ... (stripes,
arXiv 2311.09431): an n-th of every document, early and late tokens alike. At step s of the ring, rank r has the keys of
rank r - s. With all-to-alls, a rank holds an n-th of the row, and computes whole rows. In a ring of groups, each group
has the tokens of a rank of the ring, of which its ranks hold equal parts, in order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from llama_ds.config.context_parallel import CpSizes


def own_ranges(tokens: int, rank: int, sizes: CpSizes) -> tuple[range, ...]:
    """Return the positions that a rank holds of a row of `tokens`, in order.

    Raises:
        ValueError: The number of ranks, or twice that of a ring without stripes, does not divide `tokens`.
    """
    chunks = sizes.chunks
    multiple = math.lcm(chunks, sizes.ranks)
    if tokens % multiple:
        raise ValueError(f"{tokens} tokens of a row are not a multiple of {multiple}")
    length, own = tokens // chunks, tokens // sizes.ranks
    group, member = divmod(rank, sizes.all_to_all)
    begin = member * own  # where this rank's part of the group's tokens begins
    if sizes.striped:
        return (range(group, tokens, sizes.ring)[begin : begin + own],)
    found = []
    for number, chunk in enumerate(sorted({group, chunks - 1 - group})):
        first, last = max(begin - number * length, 0), min(begin + own - number * length, length)
        if first < last:
            found.append(range(chunk * length + first, chunk * length + last))
    return tuple(found)


class RingBlock(NamedTuple):
    """A step of the ring on one rank: which of its queries meet which of the keys at hand."""

    source: int  # rank to which the keys belong
    queries: slice
    keys: slice
    causal: bool  # False: every query sees every key


def ring_block(length: int, rank: int, size: int, step: int) -> RingBlock:
    """Return what a rank with `length` tokens in two chunks computes at a step of the ring, counted from 0.

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
