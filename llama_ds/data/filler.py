"""Filler: the ids that complete the last row of an extent. They are inputs, but no labels.

Rows that a run reads, in training and in evaluation, carry their own mask: a filler id i is stored as ~i, a negative
number. The mask thus passes through checksums, broadcasts and copies together with the ids. Shards store plain ids.

Shapes: R rows, T seq_len.
"""

from __future__ import annotations

import numpy as np


def mark_filler(rows: np.ndarray, labels: np.ndarray) -> None:
    """Replace the filler ids i of `rows` (R, T + 1) by ~i in place; `labels` (R,) counts each row's real labels."""
    for row in np.flatnonzero(labels < rows.shape[1] - 1):
        filler = rows[row, labels[row] + 1 :]
        np.invert(filler, out=filler)


def plain_ids(rows: np.ndarray) -> np.ndarray:
    """Return rows with marked filler as plain ids."""
    return np.where(rows < 0, ~rows, rows)


def count_labels(rows: np.ndarray) -> int:
    """Return the number of labels, without filler, of marked rows (R, T + 1)."""
    return int((rows[:, 1:] >= 0).sum())
