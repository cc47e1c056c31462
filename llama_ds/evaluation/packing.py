"""Requests in rows: sorted by length, packed behind each other if documents are masked, else padded on the right.

A row is an array of T + 1 ids, whose columns overlap as ids and labels. Ids that are no labels are marked as in
`llama_ds/data/filler.py`: only the predicted ids have a loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llama_ds.config.document_marks import DocumentMarks
from llama_ds.evaluation.requests import Encoded

SHORTEST = 16  # tokens of the shortest rows: shorter ones would not be faster


@dataclass(frozen=True)
class Slot:
    """Where a request's predicted ids are among the labels of a row: columns [start, stop)."""

    request: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class PackedRow:
    """One row of T + 1 ids and the requests in it."""

    ids: np.ndarray
    slots: tuple[Slot, ...]
    texts: tuple[np.ndarray, ...] = ()  # of a branched row: the columns of each request, those it shares included


def row_lengths(seq_len: int, multiple: int = 1, few: bool = True) -> list[int]:
    """Return the allowed numbers of tokens of a row: `seq_len` and its halves, each a multiple of `multiple`.

    They are few, because each is another shape to compile and to allocate. Not `few`: all multiples of `SHORTEST`.
    """
    if not few:
        return [*range(SHORTEST, seq_len, SHORTEST), seq_len]
    lengths = [seq_len]
    while lengths[-1] % (2 * multiple) == 0 and lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    return lengths[::-1]


def padded(requests: Sequence[Encoded], lengths: Sequence[int], fill: int) -> dict[int, list[PackedRow]]:
    """Return rows by their number of tokens, one request in each, in the shortest of `lengths` that holds it.

    Attention is causal, so padding on the right changes nothing. Longest first.
    """
    rows: dict[int, list[PackedRow]] = {}
    for number in sorted(range(len(requests)), key=lambda i: -len(requests[i].ids)):
        tokens = next(length for length in lengths if length + 1 >= len(requests[number].ids))
        rows.setdefault(tokens, []).append(_row(requests, [number], tokens, fill))
    return rows


def packed(requests: Sequence[Encoded], seq_len: int, marks: DocumentMarks) -> dict[int, list[PackedRow]]:
    """Return rows of `seq_len` tokens, each filled with requests by first fit, longest first.

    For models that mask documents. A request that does not begin with the mark of a document, such as a truncated one,
    has the beginning of a row; where documents end with a mark only, none may follow another.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    first_open, shortest = 0, min((len(request.ids) for request in requests), default=0)
    for number in sorted(range(len(requests)), key=lambda i: -len(requests[i].ids)):
        ids = requests[number].ids
        own = marks.begin is not None and ids[0] == marks.begin
        fits = (i for i in range(first_open, len(rows)) if own and free[i] >= len(ids))
        place = next(fits, len(rows))
        if place == len(rows):
            rows.append([])
            free.append(seq_len + 1)
        rows[place].append(number)
        free[place] -= len(ids)
        while first_open < len(rows) and free[first_open] < shortest:
            first_open += 1
    return {seq_len: [_row(requests, row, seq_len, marks.eos) for row in rows]} if rows else {}


def _row(requests: Sequence[Encoded], numbers: Sequence[int], tokens: int, fill: int) -> PackedRow:
    ids = np.full(tokens + 1, ~fill, np.int64)
    slots, start = [], 0
    for number in numbers:
        request = requests[number]
        stop = start + len(request.ids)
        ids[start:stop] = request.ids
        known = slice(start, stop - request.scored)
        ids[known] = ~ids[known]
        slots.append(Slot(number, stop - request.scored - 1, stop - 1))
        start = stop
    return PackedRow(ids, tuple(slots))


def micro_batches(rows: Sequence[PackedRow], size: int, dp: int, fill: int) -> Iterator[list[PackedRow]]:
    """Yield micro-batches of `size` rows, padded with empty rows to as many for each of `dp` ranks.

    Micro-batch i belongs to data-parallel rank i % dp.
    """
    empty = PackedRow(np.full_like(rows[0].ids, ~fill), ())
    missing = -len(rows) % (size * dp)
    every = [*rows, *[empty] * missing]
    for start in range(0, len(every), size):
        yield every[start : start + size]
