"""Views of tensors in files: with another number of rows, sharded by columns, or with each head's rows reordered.

Shapes: a matrix is (R, C), as in `llama_ds.checkpoint.spread`; heads are K rows each. Views read lazily, one block of
rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_ds.checkpoint.spread import BLOCK_ELEMENTS
from llama_ds.checkpoint.weights import Readable
from llama_ds.layout.vocab_parts import part_rows
from llama_ds.layout.weights import KEY, QUERY

ROTATED = (QUERY.name, KEY.name)  # weights whose rows `RotaryReordered` reorders


class View:
    """A matrix whose elements are read from another one."""

    def __init__(self, source: Readable, shape: tuple[int, ...]) -> None:
        self.source, self.shape = source, shape

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        return self.source.dtype

    @property
    def paths(self) -> set[str]:
        """The files that hold it."""
        return self.source.paths

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the unsharded tensor, in `dtype` or as stored."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype)
        self.read(out)
        return out

    def read(self, out: Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        """Fill `out` with elements of the shard of tensor-parallel rank `rank` of `size`, from `start` on."""
        raise NotImplementedError


class TableRows(View):
    """A table resized to `rows` rows and sharded by rows, however its files are sharded. Missing rows are zeros."""

    def __init__(self, source: Readable, rows: int) -> None:
        super().__init__(source, (rows, *source.shape[1:]))

    def read(self, out: Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        """Fill `out` with elements of the rows from rank * ceil(R / size) on, starting at element `start`."""
        out = out.view(-1)
        rows, width = self.shape
        begin = rank * part_rows(rows, size) * width + start
        available = min(max(min(rows, self.source.shape[0]) * width - begin, 0), len(out))
        if available:
            self.source.read(out[:available], 0, 1, begin)
        out[available:] = 0


class RowBlocks(View):
    """A matrix that is computed in blocks of rows; the rows of a block are a multiple of `unit`."""

    unit = 1

    def read(self, out: Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        """Fill `out` with elements of the shard of tensor-parallel rank `rank` of `size`, from `start` on."""
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
        """Return the number of columns in the shard of one of `size` ranks."""
        return self.shape[1]

    def _block(self, rank: int, size: int, row: int, buffer: Tensor) -> Tensor:
        """Return the rank's rows from `row` on. `buffer` (rows, C) gives their number and is scratch memory."""
        raise NotImplementedError


class Columns(RowBlocks):
    """A matrix sharded by columns, although its files are sharded by rows: rank r of n has columns from r C / n on."""

    def __init__(self, source: Readable) -> None:
        super().__init__(source, source.shape)

    def _width(self, size: int) -> int:
        return self.shape[1] // size

    def _block(self, rank: int, size: int, row: int, buffer: Tensor) -> Tensor:
        self.source.read(buffer.view(-1), 0, 1, row * self.shape[1])
        width = self._width(size)
        return buffer[:, rank * width : (rank + 1) * width]


class RotaryReordered(RowBlocks):
    """The query or key projection with the rows of every head in the other rotary layout, sharded by rows.

    Rotary embeddings rotate K / 2 pairs of a head's rows. Here and in Hugging Face's format, pair i is rows i and
    i + K / 2 (halves). In Meta's format it is rows 2 i and 2 i + 1 (a complex number).
    """

    def __init__(self, source: Readable, head_dim: int, to_halves: bool) -> None:
        super().__init__(source, source.shape)
        self.unit = head_dim
        self._pairs = (head_dim // 2, 2) if to_halves else (2, head_dim // 2)

    def _block(self, rank: int, size: int, row: int, buffer: Tensor) -> Tensor:
        self.source.read(buffer.view(-1), rank, size, row * self.shape[1])
        return buffer.view(-1, *self._pairs, self.shape[1]).transpose(1, 2)  # (heads, 2, K / 2, C) or back
