"""Shares the matrices of a pipeline stage over its ranks, for optimizers that need whole matrices.

A stage's ranks are numbered by (data-parallel rank, tensor-parallel rank), the latter innermost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heapreplace
from math import prod

from llama_ds.layout.optimizer_states import FP32_BYTES

ITERATIONS = 5  # Newton-Schulz iterations in a step
# Iterations on one X X^T. Two passes over X take 8 n^2 m + 28 n^3 FLOPs, five 20 n^2 m + 10 n^3.
FEW_PASSES, EVERY_PASS = (3, 2), (1,) * ITERATIONS
WIDE = 2  # m / n from which on few passes are faster, measured
WAVES = 4  # parts of all matrices of a rank, so that one travels while another is orthogonalised


@dataclass(frozen=True)
class HeldMatrix:
    """A matrix of a stage, and the elements of it that each rank holds."""

    name: str  # name of the parameter in the engine
    part_shape: tuple[int, ...]  # (rows, columns) of a tensor-parallel part
    cut: int  # dimension sharded over tensor-parallel ranks
    ranges: tuple[tuple[int, int], ...]  # by data-parallel rank: first element held of the flat part, and the end

    @cached_property
    def part_numel(self) -> int:
        """Number of elements of a tensor-parallel part."""
        return prod(self.part_shape)

    @cached_property
    def replicated(self) -> bool:
        """Whether every data-parallel rank holds entire parts (ZeRO-0)."""
        return all(held == (0, self.part_numel) for held in self.ranges)

    def count(self, data_rank: int) -> int:
        """Return the number of elements of the part that a data-parallel rank holds."""
        start, end = self.ranges[data_rank]
        return end - start

    def shape(self, tp: int) -> tuple[int, int]:
        """Return (rows, columns) of the whole matrix."""
        rows, columns = (size * (tp if dim == self.cut else 1) for dim, size in enumerate(self.part_shape))
        return rows, columns


def newton_schulz_flops(rows: int, columns: int, iterations: int) -> int:
    """Return the FLOPs of `iterations` of X <- a X + (b A + c A A) X with A = X X^T, X being wide: (n, m), n <= m."""
    n, m = sorted((rows, columns))
    return iterations * (2 * n * n * m + 2 * n**3 + 2 * n * n * m)


def newton_schulz_elements(rows: int, columns: int, element_bytes: int) -> int:
    """Return the elements that `parallel/newton_schulz.py` holds at most, beside the matrix itself."""
    n, m = sorted((rows, columns))
    if element_bytes < FP32_BYTES:  # X, its product with a, the other product and their sum; or products (n, n)
        return max(4 * n * m + n * n, 2 * n * m + 4 * n * n)
    return n * m + max(n * n + n * m, (5 if m >= WIDE * n else 2) * n * n)


def owners(costs: Sequence[int], load: list[int]) -> list[int]:
    """Return the owner of each item: the most costly first, each to the rank with the least so far (Graham 1969).

    `load` is what the ranks own already, and is advanced.
    """
    found = [0] * len(costs)
    least = [(cost, rank) for rank, cost in enumerate(load)]
    heapify(least)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[item] = rank = least[0][1]
        load[rank] += costs[item]
        heapreplace(least, (load[rank], rank))
    return found


def waves(owned: Sequence[int], count: int) -> list[list[int]]:
    """Return the items, whose owners are `owned`, in at most `count` waves, which share each owner's items evenly."""
    found: list[list[int]] = [[] for _ in range(count)]
    total, seen = Counter(owned), Counter[int]()
    for item, owner in enumerate(owned):
        found[seen[owner] * count // total[owner]].append(item)
        seen[owner] += 1
    return [wave for wave in found if wave]
