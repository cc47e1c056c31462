"""Tensors of files seen otherwise: with other rows, cut along columns, or with the rows of a head in another order.

Shapes: a matrix is (R, C), as in `llama_ds.checkpoint.spread`; heads are K rows each. Nothing is read before it is
asked for, and then a block of rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_ds.checkpoint.spread import BLOCK_ELEMENTS
from llama_ds.checkpoint.weights import Readable


class View:
    """A matrix that is read through another one."""

    def __init__(self, source: Readable, shape: tuple[int, ...]) -> None:
        self.source, self.shape = source, shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it is stored in."""
        return self.source.dtype

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the whole tensor, in `dtype` or as stored."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype)
        self.read(out)
        return out

    def read(self, out: Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        """Fill `out` with the elements from `start` on of what tensor-parallel rank `rank` of `size` holds."""
        raise NotImplementedError


class TableRows(View):
    """A table of `rows` rows, cut by rows whatever way its files are: rows that they lack are zeros."""

    def __init__(self, source: Readable, rows: int) -> None:
        super().__init__(source, (rows, *source.shape[1:]))

    def read(self, out: Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        """Fill `out` with the elements from `start` on of rows rank * R / size and on."""
        out = out.view(-1)
        rows, width = self.shape
        begin = rank * (rows // size) * width + start
        there = min(max(self.source.shape[0] * width - begin, 0), len(out))
        if there:
            self.source.read(out[:there], 0, 1, begin)
        out[there:] = 0


class RowBlocks(View):
    """A matrix that is made a block of rows at a time, each block a multiple of `unit` rows."""

    unit = 1

    def read(self, out: Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        """Fill `out` with the elements from `start` on of what tensor-parallel rank `rank` of `size` holds."""
        out = out.view(-1)
        width, unit = self._width(size), self.unit
        end = start + len(out)
        step = unit * max(1, BLOCK_ELEMENTS // (unit * self.shape[1]))
        first, last = start // (width * unit) * unit, -(-end // (width * unit)) * unit
        for row in range(first, last, step):
            rows = min(step, last - row)
            block = self._block(rank, size, row, torch.empty(rows, self.shape[1], dtype=out.dtype)).reshape(-1)
            begin, stop = max(start, row * width), min(end, (row + rows) * width)
            out[begin - start : stop - start] = block[begin - row * width : stop - row * width]

    def _width(self, size: int) -> int:
        """Return the columns that a rank of `size` holds."""
        return self.shape[1]

    def _block(self, rank: int, size: int, row: int, room: Tensor) -> Tensor:
        """Return the rank's rows from `row` on, as many as `room` (rows, C) has, which may be used to read them."""
        raise NotImplementedError


class Columns(RowBlocks):
    """A matrix that is cut by rows in its files, cut by columns: rank r of n holds columns r C / n and on."""

    def __init__(self, source: Readable) -> None:
        super().__init__(source, source.shape)

    def _width(self, size: int) -> int:
        return self.shape[1] // size

    def _block(self, rank: int, size: int, row: int, room: Tensor) -> Tensor:
        self.source.read(room.view(-1), 0, 1, row * self.shape[1])
        width = self._width(size)
        return room[:, rank * width : (rank + 1) * width]


class RotaryReordered(RowBlocks):
    """The query or key projection with the rows of every head in the other rotary layout; cut by rows.

    Rotary embeddings turn K / 2 pairs of a head's rows. Here and at Hugging Face pair i is rows i and i + K / 2
    (halves); at Meta it is rows 2 i and 2 i + 1 (neighbours), as complex numbers.
    """

    def __init__(self, source: Readable, head_dim: int, to_halves: bool) -> None:
        super().__init__(source, source.shape)
        self.unit = head_dim
        self._pairs = (head_dim // 2, 2) if to_halves else (2, head_dim // 2)

    def _block(self, rank: int, size: int, row: int, room: Tensor) -> Tensor:
        self.source.read(room.view(-1), rank, size, row * self.shape[1])
        return room.view(-1, *self._pairs, self.shape[1]).transpose(1, 2)  # (heads, 2, K / 2, C) or back
