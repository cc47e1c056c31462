"""Rows of a batch that is asked for in tokens."""

from __future__ import annotations

from llama_ds.errors import UserError

TOLERANCE = 0.05


def rows_of(tokens: int, seq_len: int) -> int:
    """Return the rows nearest to `tokens` / `seq_len` that most layouts divide.

    Whole rows are taken as they are. Else, as with "4M" for 4,194,304, of the numbers within 5 percent the one with the
    most factors of two, then the nearest.

    Raises:
        UserError: fewer tokens than a row has.
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
