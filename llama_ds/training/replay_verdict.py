"""Which ranks computed wrongly, from fingerprints of results and of the same results computed again.

Each rank's own results are computed again by a data-parallel peer. If some pair disagrees, both compute once more what
they have computed:

- A rank that does not repeat its own result has an intermittent fault.
- If all repeat theirs, a fault is permanent. The rank that computed wrongly disagrees with two peers, the one that
  checks it and the one that it checks, and is named; if these are the same, as with two replicas, both are named.

A fault in the input of a collective reaches all ranks of its tensor- or context-parallel group, which are then named.

Shapes: R ranks, K kinds of results, 6 integers of a fingerprint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_ds.parallel.fingerprints import agree


@dataclass(frozen=True)
class Difference:
    """A result that two ranks have computed differently."""

    owner: int
    peer: int  # the rank that computed it again
    kind: int


def exact_kinds(own: np.ndarray, repeated: np.ndarray) -> np.ndarray:
    """Return for each kind whether most ranks repeat their own results bit for bit: (K,) from (R, K, 6) twice."""
    return agree(own, repeated, exact=True).mean(0) > 0.5


def differences(own: np.ndarray, again: np.ndarray, sources: Sequence[int], exact: np.ndarray) -> list[Difference]:
    """Return where ranks disagree.

    Args:
        own: each rank's own results: (R, K, 6).
        again: what each rank computed again: (R, K, 6).
        sources: the rank whose results those were, of each rank.
        exact: whether each kind must agree bit for bit: (K,).
    """
    same = _same(own[list(sources)], again, exact)
    return [Difference(sources[rank], int(rank), int(kind)) for rank, kind in np.argwhere(~same)]


def wrong_ranks(
    found: Sequence[Difference],
    firsts: Sequence[np.ndarray],
    seconds: Sequence[np.ndarray],
    exact: np.ndarray,
) -> list[int]:
    """Return the ranks that computed wrongly.

    Args:
        found: where they disagree.
        firsts: what each rank computed: its own results and a peer's, (R, K, 6) each.
        seconds: the same, computed once more.
        exact: as in `differences`.
    """
    unsteady = np.zeros(len(firsts[0]), dtype=bool)
    for first, second in zip(firsts, seconds, strict=True):
        unsteady |= ~_same(first, second, exact).all(-1)
    if unsteady.any():
        return np.flatnonzero(unsteady).tolist()
    pairs = {(difference.owner, difference.peer) for difference in found}
    count = Counter(rank for pair in pairs for rank in pair)
    return sorted(rank for rank, times in count.items() if times == max(count.values()))


def _same(first: np.ndarray, second: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.where(exact, agree(first, second, exact=True), agree(first, second, exact=False))
