"""The documents of rows in plans, and the pairs of tokens that attention computes of them.

Documents follow each other without gaps, and rows cut this stream. The part of a document in a row is a document of its
own there. A token sees those of its document up to itself.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from llama_ds.config.context_parallel import CpSizes
from llama_ds.config.schema import RunConfig
from llama_ds.layout.row_cuts import own_ranges

ROWS = 32  # rows of a plan
DOCUMENTS = 10_000  # documents after which a plan has no further row


@dataclass(frozen=True, eq=False)  # the planner looks times up by these objects, of which there is one for each plan
class PlannedRows:
    """Rows that stand for those of a run: the lengths of the documents of each, in order."""

    rows: tuple[tuple[int, ...], ...]

    @cached_property
    def counts(self) -> tuple[tuple[int, float], ...]:
        """Each length of a document, with the mean number of such documents in a row."""
        found = Counter(length for row in self.rows for length in row)
        return tuple((length, found[length] / len(self.rows)) for length in sorted(found))

    @cached_property
    def keys(self) -> float:
        """The mean number of tokens that a token sees."""
        pairs = sum(length * (length + 1) // 2 for row in self.rows for length in row)
        return pairs / sum(map(sum, self.rows))


def planned_rows(run: RunConfig) -> PlannedRows:
    """Return rows with documents as `data.document_tokens` states, or of one document: see `assumption`."""
    data = run.data
    masked = data.document_mask and data.document_tokens
    return packed_rows(data.document_tokens, data.seq_len) if masked else one_document(data.seq_len)


def assumption(run: RunConfig) -> str:
    """Return in words which documents a plan counts."""
    if not run.data.document_mask:
        return "rows of one document, as without data.document_mask"
    lengths = run.data.document_tokens
    if not lengths:
        return "rows of one document, because data.document_tokens does not state the documents' lengths"
    return f"documents of {sum(lengths) / len(lengths):,.0f} tokens on average, as data.document_tokens states"


@lru_cache(maxsize=100)
def one_document(tokens: int) -> PlannedRows:
    """Return a row that is one document."""
    return PlannedRows(((tokens,),))


@lru_cache(maxsize=100)
def packed_rows(lengths: tuple[int, ...], tokens: int, count: int = ROWS) -> PlannedRows:
    """Return up to `count` rows of `tokens` that cut a stream of documents.

    Their lengths are drawn from `lengths`, with the same draws for every plan.
    """
    rows: list[tuple[int, ...]] = []
    draws, left = random.Random(0), 0
    while len(rows) < count and sum(map(len, rows)) < DOCUMENTS:
        row, room = [], tokens
        while room:
            left = left or draws.choice(lengths)
            row.append(min(left, room))
            left, room = left - row[-1], room - row[-1]
        rows.append(tuple(row))
    return PlannedRows(tuple(rows))


def ring_pairs(row: Sequence[int], sizes: CpSizes) -> list[int]:
    """Return the pairs of (query, key) that each group of the ring computes of a row with these documents."""
    groups, found = sizes._replace(all_to_all=1), []
    for group in range(sizes.ring):
        pairs = 0
        for part in own_ranges(sum(row), group, groups):
            begin = 0
            for length in row:
                first = part.start + max(0, -((part.start - begin) // part.step)) * part.step
                own = len(range(first, min(begin + length, part.stop), part.step))
                pairs += own * (first - begin + 1) + part.step * own * (own - 1) // 2
                begin += length
        found.append(pairs)
    return found


@lru_cache(maxsize=1000)
def ring_imbalance(planned: PlannedRows, sizes: CpSizes, micro_batch: int) -> float:
    """Return the attention of the slowest group of a ring over the mean, less 1, over micro-batches of these rows.

    As `cp_imbalance` of a run, less 1: a micro-batch takes as long as its slowest group.
    """
    work = [ring_pairs(row, sizes) for row in planned.rows]
    batches = [
        [sum(work[(first + i) % len(work)][group] for i in range(micro_batch)) for group in range(sizes.ring)]
        for first in range(0, len(work), micro_batch)
    ]
    return sum(map(max, batches)) * sizes.ring / sum(map(sum, batches)) - 1
