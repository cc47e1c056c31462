"""Shares the matrices of a pipeline stage over its ranks, for optimizers that need whole matrices.

A stage's ranks are numbered by (data-parallel rank, tensor-parallel rank), the latter innermost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

ITERATIONS = 5  # Newton-Schulz iterations in a step


@dataclass(frozen=True)
class HeldMatrix:
    """A matrix of a stage, and the elements of it that each rank holds."""

    name: str  # name of the parameter in the engine
    part_shape: tuple[int, ...]  # (rows, columns) of a tensor-parallel part
    cut: int  # dimension sharded over tensor-parallel ranks
    ranges: tuple[tuple[int, int], ...]  # by data-parallel rank: first element held of the flat part, and the end

    @property
    def part_numel(self) -> int:
        """Number of elements of a tensor-parallel part."""
        return prod(self.part_shape)

    @property
    def replicated(self) -> bool:
        """Whether every data-parallel rank holds entire parts (ZeRO-0)."""
        return all(held == (0, self.part_numel) for held in self.ranges)

    def shape(self, tp: int) -> tuple[int, int]:
        """Return (rows, columns) of the whole matrix."""
        rows, columns = (size * (tp if dim == self.cut else 1) for dim, size in enumerate(self.part_shape))
        return rows, columns


def newton_schulz_flops(rows: int, columns: int, iterations: int) -> int:
    """Return the FLOPs of `iterations` of X <- a X + (b A + c A A) X with A = X X^T, X being wide: (n, m), n <= m."""
    n, m = sorted((rows, columns))
    return iterations * (2 * n * n * m + 2 * n**3 + 2 * n * n * m)


def owners(costs: Sequence[int], load: list[int]) -> list[int]:
    """Return the owner of each item: the most costly first, each to the rank with the least so far (Graham 1969).

    `load` is what the ranks own already, and is advanced.
    """
    found = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[item] = min(range(len(load)), key=lambda rank: load[rank])
        load[found[item]] += costs[item]
    return found


def waves(owned: Sequence[int], count: int) -> list[list[int]]:
    """Return the items, whose owners are `owned`, in at most `count` waves, which share each owner's items evenly."""
    found: list[list[int]] = [[] for _ in range(count)]
    total, seen = Counter(owned), Counter[int]()
    for item, owner in enumerate(owned):
        found[seen[owner] * count // total[owner]].append(item)
        seen[owner] += 1
    return [wave for wave in found if wave]
