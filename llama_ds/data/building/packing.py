"""Packing: documents are concatenated and cut into rows; only the last row is padded.

Row k holds ids k*seq_len .. (k+1)*seq_len: the last id of a row is also the first of the next, so that inputs row[:-1]
and labels row[1:] make every id but the very first a label exactly once.

Shapes: R rows, T seq_len.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from llama_ds.data.source.manifest import rows_of


def id_dtype(vocab_size: int) -> np.dtype:
    """Return the little-endian dtype that holds every id below `vocab_size`: uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def pack(runs: Iterable[np.ndarray], seq_len: int, dtype: np.dtype, fill: int, rows: int) -> Iterator[np.ndarray]:
    """Yield the rows of the ids in consecutive `runs`, up to `rows` at a time: (R, T + 1).

    The last row is padded with the id `fill`. A yielded array is valid only until the next one is requested.
    """
    buffer = np.empty(rows * seq_len + 1, dtype)
    held = 0
    for run in runs:
        while len(run):
            taken = min(len(run), len(buffer) - held)
            buffer[held : held + taken] = run[:taken]
            run, held = run[taken:], held + taken
            if held == len(buffer):
                yield _cut(buffer, seq_len)
                buffer[0], held = buffer[-1], 1
    if last := rows_of(held, seq_len):
        buffer[held:] = fill
        yield _cut(buffer[: last * seq_len + 1], seq_len)


def _cut(stream: np.ndarray, seq_len: int) -> np.ndarray:
    # (R*T + 1,) -> (R, T + 1), a view
    return np.lib.stride_tricks.sliding_window_view(stream, seq_len + 1)[::seq_len]
