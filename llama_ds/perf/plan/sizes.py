"""Converts a batch size in tokens to rows."""

from __future__ import annotations

from llama_ds.errors import UserError

TOLERANCE = 0.05


def rows_of(tokens: int, seq_len: int) -> int:
    """Return a number of rows near `tokens` / `seq_len` that many layouts can divide.

    An integral quotient is returned as it is. Otherwise, as for "4M" instead of 4,194,304, the result is the number
    within 5 percent with the most factors of two, and of those the nearest.

    Raises:
        UserError: There are fewer tokens than one row has.
    """
    if tokens < seq_len:
        raise UserError(
            f"--global-batch-tokens {tokens} is less than one row of {seq_len} tokens; use {seq_len} or more"
        )
    exact = tokens / seq_len
    if exact == int(exact):
        return int(exact)
    low, high = max(1, int(exact * (1 - TOLERANCE))), int(exact * (1 + TOLERANCE)) + 1
    return min(range(low, high + 1), key=lambda n: (-((n & -n).bit_length()), abs(n - exact)))
