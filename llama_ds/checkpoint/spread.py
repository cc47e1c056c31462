"""One tensor of the model, stored in several files: sharded into tensor-parallel parts, each split into runs.

Shapes: a matrix is (R, C). It is sharded along dimension 0 (R / parts rows each, rounded up; the last parts have the
rest) or 1 (C / parts columns each); an unsharded tensor has one part. Elements of a part are numbered in its row-major
order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ds.checkpoint.stored import Stored
from llama_ds.layout.vocab_parts import part_rows

BLOCK_ELEMENTS = 4 << 20  # size of the block in memory when columns are regrouped


@dataclass(frozen=True)
class Run:
    """A run of `numel` elements of a part, from `start` on."""

    start: int
    stored: Stored
    numel: int


class Spread:
    """A tensor of the model, spread over files."""

    def __init__(self, shape: Sequence[int], dim: int | None, parts: Sequence[Sequence[Run]]) -> None:
        """Take the runs of each part, both in order and without gaps. `dim` None: unsharded, with a single part."""
        self.shape, self.dim = tuple(shape), dim
        self._parts = [list(part) for part in parts]
        self._starts = [[run.start for run in part] for part in self._parts]
        self.numel = torch.Size(self.shape).numel()
        self._row = torch.Size(self.shape[1:]).numel()  # elements of a row

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        return self._parts[0][0].stored.dtype

    @property
    def paths(self) -> set[str]:
        """The files that hold it."""
        return {run.stored.path for part in self._parts for run in part}

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the unsharded tensor, in `dtype` or as stored."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype)
        self.read(out)
        return out

    def read(self, out: Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        """Fill `out` with elements of the shard of tensor-parallel rank `rank` of `size`, from `start` on.

        `out` is contiguous, on the CPU, of any dtype. `size` divides the columns that are sharded, but not necessarily
        the rows: rows of the last shards that the tensor does not have are zeros.

        Raises:
            UserError: a file is truncated or cannot be read.
        """
        out = out.view(-1)
        if self.dim is None:
            self._read_part(0, out, start)
        elif self.dim == 0:
            first = rank * part_rows(self.shape[0], size) * self._row + start
            available = min(max(self.numel - first, 0), len(out))
            self._read_rows(out[:available], first)
            out[available:] = 0
        elif size == len(self._parts):
            self._read_part(rank, out, start)
        else:
            self._read_columns(out, rank, size, start)

    def _read_rows(self, out: Tensor, start: int) -> None:
        """Read from parts that are blocks of rows. `start` counts through all parts, one after the other."""
        length = part_rows(self.shape[0], len(self._parts)) * self._row
        done = 0
        while done < len(out):
            part, begin = divmod(start + done, length)
            count = min(length - begin, len(out) - done)
            self._read_part(part, out[done : done + count], begin)
            done += count

    def _read_columns(self, out: Tensor, rank: int, size: int, start: int) -> None:
        width, own = self.shape[1] // len(self._parts), self.shape[1] // size
        first, last = rank * own, (rank + 1) * own
        sources = range(first // width, -(-last // width))
        rows_at_once = max(1, BLOCK_ELEMENTS // max(width, own))
        end = start + len(out)
        for row in range(start // own, -(-end // own), rows_at_once):
            rows = min(rows_at_once, -(-end // own) - row)
            block = torch.empty(rows, own, dtype=out.dtype)
            for part in sources:
                piece = torch.empty(rows, width, dtype=out.dtype)
                self._read_part(part, piece.view(-1), row * width)
                begin, stop = max(first, part * width), min(last, (part + 1) * width)
                block[:, begin - first : stop - first] = piece[:, begin - part * width : stop - part * width]
            begin, stop = max(start, row * own), min(end, (row + rows) * own)
            out[begin - start : stop - start] = block.view(-1)[begin - row * own : stop - row * own]

    def _read_part(self, part: int, out: Tensor, start: int) -> None:
        runs = self._parts[part]
        index = bisect_right(self._starts[part], start) - 1
        done = 0
        while done < len(out):
            run = runs[index]
            begin = start + done - run.start
            count = min(run.numel - begin, len(out) - done)
            run.stored.read(out[done : done + count], begin)
            done, index = done + count, index + 1


def in_one_file(stored: Stored, dim: int | None) -> Spread:
    """Return a tensor stored unsharded in one file, to be sharded along `dim`."""
    return Spread(stored.shape, dim, [[Run(0, stored, torch.Size(stored.shape).numel())]])
