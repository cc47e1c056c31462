"""Which ranks computed wrongly, from fingerprints of results and of the same results computed again.

Each rank's own results are computed again by a data-parallel peer. If some pair disagrees, both compute once more what
they have computed, and a third replica, if there is one, computes the owner's results too:

- A rank that does not repeat its own result has a fault that comes and goes, and is named.
- If all repeat theirs, the fault stays. Of the pair, the one with whom the third does not agree is named; without a
  third, or if it agrees with neither, both are.

A fault in the input of a collective reaches all ranks of its tensor- or context-parallel group, which are then named.

Shapes: R ranks, K kinds of results, 6 integers of a fingerprint.
"""

from __future__ import annotations

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
    thirds: np.ndarray | None,
    exact: np.ndarray,
) -> list[int]:
    """Return the ranks that computed wrongly.

    Args:
        found: where they disagree.
        firsts: what each rank computed: its own results and a peer's, (R, K, 6) each.
        seconds: the same, computed once more.
        thirds: each rank's own results, computed by a third replica: (R, K, 6); None: there is none.
        exact: as in `differences`.
    """
    unsteady = np.zeros(len(firsts[0]), dtype=bool)
    for first, second in zip(firsts, seconds, strict=True):
        unsteady |= ~_same(first, second, exact).all(-1)
    if unsteady.any():
        return np.flatnonzero(unsteady).tolist()
    own, again = firsts
    wrong: set[int] = set()
    for owner, peer in {(difference.owner, difference.peer) for difference in found}:
        sides = {owner, peer}
        if thirds is not None:
            agrees = {
                rank
                for rank, results in ((owner, own[owner]), (peer, again[peer]))
                if _same(results, thirds[owner], exact).all()
            }
            sides = sides - agrees
        wrong |= sides
    return sorted(wrong)


def _same(first: np.ndarray, second: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.where(exact, agree(first, second, exact=True), agree(first, second, exact=False))
