"""The rank that computed wrongly is named from what ranks have computed twice; simulated ranks, with real faults.

Each rank's results are random numbers that its rows determine; a fault changes them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from llama_ds.training.replay_verdict import differences, exact_kinds, wrong_ranks

KINDS = 3
EXACT = np.array([True, True, True])
Fault = Callable[[int, int], bool]  # whether a rank's n-th computation is wrong


def computed(owner: int, wrong: bool, salt: int = 0) -> np.ndarray:
    """Return fingerprints (K, 6) of the results for the rows of `owner`."""
    results = np.random.default_rng(owner).integers(0, 1 << 40, (KINDS, 6))
    results[1:] += wrong * (1 + salt)  # a fault in the backward
    return results


def judge(replicas: int, shift: int, fault: Fault) -> list[int]:
    ranks = range(replicas)
    sources = [(rank - shift) % replicas for rank in ranks]
    own = np.stack([computed(rank, fault(rank, 0)) for rank in ranks])
    again = np.stack([computed(sources[rank], fault(rank, 1)) for rank in ranks])
    found = differences(own, again, sources, EXACT)
    if not found:
        return []
    seconds = [
        np.stack([computed(rank, fault(rank, 2)) for rank in ranks]),
        np.stack([computed(sources[rank], fault(rank, 3)) for rank in ranks]),
    ]
    further = 1 + shift % (replicas - 1) if replicas > 2 else 0
    by_others = [computed(rank, fault((rank + further) % replicas, 4)) for rank in ranks]
    assert {difference.kind for difference in found} == {1, 2}
    return wrong_ranks(found, [own, again], seconds, np.stack(by_others) if further else None, EXACT)


@pytest.mark.parametrize("replicas", [2, 3, 4, 8])
@pytest.mark.parametrize("when", [0, 1])
def test_a_fault_that_comes_once_names_its_rank_alone(replicas: int, when: int) -> None:
    """In its own step or while it checked a peer, and also with two replicas: the rank does not repeat itself."""
    for shift in range(1, replicas):
        for bad in range(replicas):
            assert judge(replicas, shift, lambda rank, n, bad=bad: (rank, n) == (bad, when)) == [bad]


@pytest.mark.parametrize(("replicas", "shift"), [(3, 1), (3, 2), (4, 1), (4, 2), (8, 3)])
def test_a_fault_that_stays_names_its_rank_alone(replicas: int, shift: int) -> None:
    """Also if it shows in only one of the rank's two computations: half of all numbers have a stuck bit anyway."""
    for bad in range(replicas):
        assert judge(replicas, shift, lambda rank, _, bad=bad: rank == bad) == [bad]
        for shows in ((0, 2), (1, 3)):
            assert judge(replicas, shift, lambda rank, n, bad=bad, on=shows: rank == bad and n in on) == [bad]


def test_of_two_that_always_differ_either_may_be_right() -> None:
    assert judge(2, 1, lambda rank, _: rank == 1) == [0, 1]
    assert judge(4, 2, lambda rank, _: rank == 1) == [1], "they check each other, and a third both"


def test_without_replicas_a_rank_is_compared_with_itself() -> None:
    assert judge(1, 0, lambda rank, n: n == 1) == [0]
    assert judge(1, 0, lambda rank, n: True) == [], "a fault that stays has nothing to be compared with"
    assert judge(3, 1, lambda rank, n: False) == []


def test_kinds_that_the_machines_do_not_repeat_are_compared_within_bounds() -> None:
    """One faulty rank of three does not make a kind inexact."""
    own = np.stack([computed(rank, False) for rank in range(3)])
    repeated = own.copy()
    repeated[1, 0, 0] += 1  # a fault on rank 1
    repeated[:2, 2, 0] += 1  # a kernel with atomic additions
    assert exact_kinds(own, repeated).tolist() == [True, True, False]
