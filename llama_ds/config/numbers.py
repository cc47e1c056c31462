"""Arithmetic on the integers of a run file."""

from __future__ import annotations


def divisors(n: int) -> list[int]:
    """Return the divisors of `n` in increasing order."""
    return [d for d in range(1, n + 1) if n % d == 0]
