"""Packing: documents laid end to end and cut into rows, without padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def id_dtype(vocab_size: int) -> np.dtype:
    """Return the little-endian dtype that holds every id below `vocab_size`: uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Packer:
    """Cuts a stream of ids into rows of seq_len + 1: inputs row[:-1], labels row[1:].

    Row k holds ids k*seq_len .. (k+1)*seq_len: the last id of a row is also the first of the next, so that every id but
    the very first is a label exactly once. What is left at the end of the stream, less than a row, is dropped.
    """

    def __init__(self, seq_len: int, dtype: np.dtype) -> None:
        self._seq_len = seq_len
        self._rest = np.empty(0, dtype)

    def add(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the rows (seq_len + 1,) that `ids` complete."""
        stream = np.concatenate([self._rest, ids.astype(self._rest.dtype)])
        rows = max(0, len(stream) - 1) // self._seq_len
        self._rest = stream[rows * self._seq_len :]
        for start in range(0, rows * self._seq_len, self._seq_len):
            yield stream[start : start + self._seq_len + 1]

    @property
    def left(self) -> int:
        """Ids that wait for a row to fill."""
        return len(self._rest)
