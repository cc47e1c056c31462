"""What was measured on a machine, at the sizes that it was measured at, and what is read between them.

Between two sizes the logarithm of the rate is interpolated over the logarithm of the size; beyond the ends the rate
stays that of the end. `tools/machine.py gemm` and `comm` measure; `compute.py` and `communication.py` look here.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, SEND = "all_reduce", "all_gather", "reduce_scatter", "send"
OPERATIONS = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, SEND)


@dataclass(frozen=True)
class ProductRates:
    """Rates of matrix products (M x K) (K x N)."""

    sizes: tuple[int, ...]  # of M, N and K alike
    tflops: tuple[tuple[tuple[float, ...], ...], ...]  # by M, N, K

    def flops_per_second(self, m: int, n: int, k: int) -> float:
        """Return the rate of one product."""
        (i, u), (j, v), (h, w) = (_between(self.sizes, size) for size in (m, n, k))
        planes = [_mix([_mix(row[h : h + 2], w) for row in plane[j : j + 2]], v) for plane in self.tflops[i : i + 2]]
        return _mix(planes, u) * 1e12


@dataclass(frozen=True)
class AttentionRates:
    """Rates of causal attention, in the FLOPs that causality leaves."""

    head_dim: tuple[int, ...]
    seq_len: tuple[int, ...]
    forward_tflops: tuple[tuple[float, ...], ...]  # by size of the heads, length of the rows
    backward_tflops: tuple[tuple[float, ...], ...]

    def flops_per_second(self, seq_len: int, head_dim: int) -> tuple[float, float]:
        """Return the rates (forward, backward)."""
        i, u = _between(self.head_dim, head_dim)
        j, v = _between(self.seq_len, seq_len)
        forward, backward = (
            _mix([_mix(row[j : j + 2], v) for row in table[i : i + 2]], u) * 1e12
            for table in (self.forward_tflops, self.backward_tflops)
        )
        return forward, backward


@dataclass(frozen=True)
class Rate:
    """Bytes a second of what only moves memory, by how much it moves."""

    bytes: tuple[float, ...]
    gb_s: tuple[float, ...]

    def bytes_per_second(self, size: float) -> float:
        """Return the rate at which `size` bytes are moved."""
        i, u = _between(self.bytes, size)
        return _mix(self.gb_s[i : i + 2], u) * 1e9


@dataclass(frozen=True)
class Kernels:
    """Rates of pointwise kernels, in bytes as `program.py` counts them: kernels that are not fused are slow ones."""

    forward: Rate  # a layer's norms, sums, rotation and activation
    backward: Rate
    loss: Rate
    optimizer: Rate


@dataclass(frozen=True)
class Collective:
    """Times of one operation among `ranks` ranks on each of `nodes` nodes, while all ranks are in such groups."""

    operation: str
    ranks: int
    nodes: int
    bytes: tuple[int, ...]  # of the whole tensor: what a gather gives, a reduce-scatter takes
    us: tuple[float, ...]

    def seconds(self, size: float) -> float:
        """Return the time for `size` bytes; beyond the largest measured, at its bandwidth."""
        i, u = _between(self.bytes, size)
        return _mix(self.us[i : i + 2], u) * max(1.0, size / self.bytes[-1]) * 1e-6

    def bus_gb_s(self) -> tuple[float, ...]:
        """Return nccl-tests' bus bandwidths, at each size: what a link carries, whatever the number of ranks."""
        share = bus_share(self.operation, self.ranks * self.nodes)
        return tuple(share * size / (us * 1e3) for size, us in zip(self.bytes, self.us, strict=True))


@dataclass(frozen=True)
class Curves:
    """All that was measured."""

    products: ProductRates | None = None
    attention: AttentionRates | None = None
    kernels: Kernels | None = None
    collectives: tuple[Collective, ...] = field(default=())

    def __hash__(self) -> int:  # asked for at every call of cached functions
        return hash(len(self.collectives))

    def collective(self, operation: str, ranks: int, nodes: int) -> Collective | None:
        """Return the times of an operation among such ranks, if measured."""
        wanted = (operation, ranks, nodes)
        return next((c for c in self.collectives if (c.operation, c.ranks, c.nodes) == wanted), None)


def bus_share(operation: str, ranks: int) -> float:
    """Return bus bandwidth over bytes per second (nccl-tests, doc/PERFORMANCE.md)."""
    if operation == SEND:
        return 1.0
    return (2.0 if operation == ALL_REDUCE else 1.0) * (ranks - 1) / ranks


def medians(found: Sequence[Any]) -> Any:
    """Return the median of each number of measurements of one shape; whole numbers are sizes, the same in all."""
    first = found[0]
    if isinstance(first, dict):
        return {key: medians([one[key] for one in found]) for key in first}
    if isinstance(first, list | tuple):
        return tuple(medians(column) for column in zip(*found, strict=True))
    return first if isinstance(first, int) else statistics.median(found)


def _between(sizes: Sequence[float], size: float) -> tuple[int, float]:
    """Return (index of the size at or below, how far it is from there to the next, 0 to 1)."""
    if size <= sizes[0] or len(sizes) == 1:
        return 0, 0.0
    i = min(bisect_right(sizes, size) - 1, len(sizes) - 2)
    return i, min(1.0, math.log(size / sizes[i]) / math.log(sizes[i + 1] / sizes[i]))


def _mix(values: Sequence[float], share: float) -> float:
    """Return the value between two, or the only one."""
    return values[0] if len(values) == 1 or not share else values[0] ** (1 - share) * values[1] ** share
