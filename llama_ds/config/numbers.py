"""Arithmetic on the integers of a run file."""

from __future__ import annotations

import math

NEAR = 12  # largest number of divisors that an error suggests


def divisors(n: int) -> list[int]:
    """Return the divisors of `n` in increasing order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def near_divisors(n: int, wanted: int) -> list[int]:
    """Return the `NEAR` divisors of `n` that are nearest to `wanted`, in increasing order."""
    return sorted(sorted(divisors(n), key=lambda d: abs(d - wanted))[:NEAR])


def near_multiples(n: int, wanted: int, count: int) -> list[int]:
    """Return the `count` positive multiples of `n` that are nearest to `wanted`, in increasing order."""
    middle = wanted // n
    around = [k * n for k in range(max(middle - count, 1), max(middle, 0) + count + 2)]
    return sorted(sorted(around, key=lambda m: abs(m - wanted))[:count])
