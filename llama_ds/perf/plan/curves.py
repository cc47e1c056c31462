"""Measured rates of a machine by size, and the interpolation between the measured sizes.

The interpolation is linear in log(rate) over log(size); beyond both ends the rate is constant. `tools/machine.py gemm`
and `comm` measure the curves; `compute.py` and `communication.py` read them.
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

    sizes: tuple[int, ...]  # grid of sizes, shared by M, N and K
    tflops: tuple[tuple[tuple[float, ...], ...], ...]  # indexed by M, N, K

    def flops_per_second(self, m: int, n: int, k: int) -> float:
        """Return the rate of one product."""
        (i, u), (j, v), (h, w) = (_between(self.sizes, size) for size in (m, n, k))
        planes = [_mix([_mix(row[h : h + 2], w) for row in plane[j : j + 2]], v) for plane in self.tflops[i : i + 2]]
        return _mix(planes, u) * 1e12


@dataclass(frozen=True)
class AttentionRates:
    """Rates of causal attention; only unmasked FLOPs count."""

    head_dim: tuple[int, ...]
    seq_len: tuple[int, ...]
    forward_tflops: tuple[tuple[float, ...], ...]  # indexed by head size, sequence length
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
    """Bandwidth of memory-bound kernels, by bytes moved."""

    bytes: tuple[float, ...]
    gb_s: tuple[float, ...]

    def bytes_per_second(self, size: float) -> float:
        """Return the bandwidth for `size` bytes, in bytes/s."""
        i, u = _between(self.bytes, size)
        return _mix(self.gb_s[i : i + 2], u) * 1e9


@dataclass(frozen=True)
class Kernels:
    """Rates of pointwise kernels, in bytes as `program.py` counts them, so unfused kernels have low rates."""

    forward: Rate  # norms, residual sums, rotary embedding and activation of a layer
    backward: Rate
    loss: Rate
    optimizer: Rate


@dataclass(frozen=True)
class Collective:
    """Times of one operation among `ranks` ranks on each of `nodes` nodes; all ranks run it at once in such groups."""

    operation: str
    ranks: int
    nodes: int
    bytes: tuple[int, ...]  # sizes of the unsharded tensor: an all-gather's output, a reduce-scatter's input
    us: tuple[float, ...]

    def seconds(self, size: float) -> float:
        """Return the time for `size` bytes; above the largest measured size, the bandwidth is constant."""
        i, u = _between(self.bytes, size)
        return _mix(self.us[i : i + 2], u) * max(1.0, size / self.bytes[-1]) * 1e-6

    def bus_gb_s(self) -> tuple[float, ...]:
        """Return the bus bandwidth at each size, as nccl-tests defines it: link bandwidth, independent of the ranks."""
        share = bus_share(self.operation, self.ranks * self.nodes)
        return tuple(share * size / (us * 1e3) for size, us in zip(self.bytes, self.us, strict=True))


@dataclass(frozen=True)
class Curves:
    """All measured curves of a machine."""

    products: ProductRates | None = None
    attention: AttentionRates | None = None
    kernels: Kernels | None = None
    collectives: tuple[Collective, ...] = field(default=())

    def __hash__(self) -> int:  # cheap, because every call of a cached function hashes it
        return hash(len(self.collectives))

    def collective(self, operation: str, ranks: int, nodes: int) -> Collective | None:
        """Return the times of an operation in groups of this kind, or None if not measured."""
        wanted = (operation, ranks, nodes)
        return next((c for c in self.collectives if (c.operation, c.ranks, c.nodes) == wanted), None)


def bus_share(operation: str, ranks: int) -> float:
    """Return the ratio of bus bandwidth to bytes per second (nccl-tests, doc/PERFORMANCE.md)."""
    if operation == SEND:
        return 1.0
    return (2.0 if operation == ALL_REDUCE else 1.0) * (ranks - 1) / ranks


def medians(found: Sequence[Any]) -> Any:
    """Return the elementwise median of nested measurements; integers are sizes and the same in all of them."""
    first = found[0]
    if isinstance(first, dict):
        return {key: medians([one[key] for one in found]) for key in first}
    if isinstance(first, list | tuple):
        return tuple(medians(column) for column in zip(*found, strict=True))
    return first if isinstance(first, int) else statistics.median(found)


def _between(sizes: Sequence[float], size: float) -> tuple[int, float]:
    """Return (index of the size at or below, fraction of the distance to the next, 0 to 1)."""
    if size <= sizes[0] or len(sizes) == 1:
        return 0, 0.0
    i = min(bisect_right(sizes, size) - 1, len(sizes) - 2)
    return i, min(1.0, math.log(size / sizes[i]) / math.log(sizes[i + 1] / sizes[i]))


def _mix(values: Sequence[float], share: float) -> float:
    """Return the geometric interpolation of two values, or the only one."""
    return values[0] if len(values) == 1 or not share else values[0] ** (1 - share) * values[1] ** share
