"""Requests in branched rows: what neighbours in the order of their ids have in common is in a row once.

So the choices of a question share its context, and the questions of a task the examples shown before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from llama_ds.evaluation.packing import PackedRow, Slot
from llama_ds.evaluation.requests import Encoded


def branched(requests: Sequence[Encoded], lengths: Sequence[int], fill: int) -> dict[int, list[PackedRow]]:
    """Return rows by their number of tokens, each the shortest of `lengths` that holds its requests; longest first."""
    order = sorted(range(len(requests)), key=lambda i: requests[i].ids)
    shared = [0, *(_shared(requests[a], requests[b]) for a, b in pairwise(order))]
    rows: dict[int, list[PackedRow]] = {}
    for start, stop in _cuts([len(requests[i].ids) for i in order], shared, lengths[-1] + 1):
        size = sum(len(requests[order[i]].ids) - (shared[i] if i > start else 0) for i in range(start, stop))
        tokens = next(length for length in lengths if length + 1 >= size)
        rows.setdefault(tokens, []).append(
            _row(requests, order[start:stop], [0, *shared[start + 1 : stop]], tokens, fill)
        )
    return dict(sorted(rows.items(), reverse=True))


def _shared(before: Encoded, request: Encoded) -> int:
    """Return how many ids a request shares with the one before it.

    The id from which its first token is predicted is its own, because a column has one label.
    """
    limit = min(len(before.ids), len(request.ids) - request.scored - 1)
    return next((i for i in range(limit) if before.ids[i] != request.ids[i]), max(0, limit))


def _cuts(sizes: Sequence[int], shared: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Yield the requests [start, stop) of each row of at most `limit` ids.

    A row ends in its second half, where the next request shares least: that is computed twice.
    """
    start = filled = 0
    fills: list[int] = []  # ids of the row before each of its requests
    at = 0
    while at < len(sizes):
        more = sizes[at] - (shared[at] if at > start else 0)
        if filled + more <= limit:
            fills.append(filled)
            filled, at = filled + more, at + 1
            continue
        late = [i for i in range(start + 1, at) if 2 * fills[i - start] >= limit]
        stop = min([at, *reversed(late)], key=lambda i: shared[i])
        yield start, stop
        start = at = stop
        filled, fills = 0, []
    if start < at:
        yield start, at


def _row(
    requests: Sequence[Encoded], numbers: Sequence[int], shared: Sequence[int], tokens: int, fill: int
) -> PackedRow:
    ids = np.full(tokens + 1, ~fill, np.int64)
    slots, texts = [], list[np.ndarray]()
    start = 0
    for number, common in zip(numbers, shared, strict=True):
        request = requests[number]
        stop = start + len(request.ids) - common
        own = np.array(request.ids[common:], np.int64)
        own[: len(own) - request.scored] = ~own[: len(own) - request.scored]
        ids[start:stop] = own
        columns = np.arange(start, stop)
        texts.append(np.concatenate([texts[-1][:common], columns]) if common else columns)
        slots.append(Slot(number, stop - request.scored - 1, stop - 1))
        start = stop
    return PackedRow(ids, tuple(slots), tuple(texts))
