"""Views of matrices that Megatron-LM stores as one: query, key and value, and gate and up.

Rows of several matrices take turns in a fused one. With lengths (a, b) it has a rows of the first matrix, b rows of the
second, the next a rows of the first, and so on.

- Query, key and value: for each of G groups the H / G heads of queries, one of keys, one of values, of K rows each:
  lengths (K H / G, K, K).
- Gate and up on T tensor-parallel ranks: for each rank its F / T rows of gate, then those of up: lengths
  (F / T, F / T).

Tensor-parallel ranks hold equal blocks of rows of the fused matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from torch import Tensor

from llama_ds.checkpoint.formats.views import View
from llama_ds.checkpoint.weights import Readable


class Unfused(View):
    """One of the matrices of a fused one. Sharded by rows."""

    def __init__(self, fused: Readable, lengths: Sequence[int], index: int) -> None:
        """Take matrix `index` of a fused matrix whose rows are a multiple of sum(lengths)."""
        self._period, self._begin, self._length = sum(lengths), sum(lengths[:index]), lengths[index]
        rows, width = fused.shape
        super().__init__(fused, (rows // self._period * self._length, width))

    def read(self, out: Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        """Fill `out` with elements of the rows from rank * R / size on, starting at element `start`."""
        out = out.view(-1)
        width = self.shape[1]
        for part, position in _turns(out, rank * (self.shape[0] // size) * width + start, self._length * width):
            turn, element = divmod(position, self._length * width)
            self.source.read(part, 0, 1, (turn * self._period + self._begin) * width + element)


class Fused(View):
    """Several matrices fused into one. Sharded by rows."""

    def __init__(self, sources: Sequence[Readable], lengths: Sequence[int]) -> None:
        """Take matrices of one width; each has the same number of turns of its length."""
        rows = sum(source.shape[0] for source in sources)
        super().__init__(sources[0], (rows, sources[0].shape[1]))
        self._sources, self._lengths = list(sources), list(lengths)
        self._begins = [0, *accumulate(lengths)]

    def read(self, out: Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        """Fill `out` with elements of the rows from rank * R / size on, starting at element `start`."""
        out = out.view(-1)
        width, period = self.shape[1], self._begins[-1]
        position, end = rank * (self.shape[0] // size) * width + start, 0
        while end < len(out):
            turn, element = divmod(position, period * width)
            index = next(i for i, begin in enumerate(self._begins[1:]) if element < begin * width)
            begin, stop = self._begins[index] * width, self._begins[index + 1] * width
            count = min(stop - element, len(out) - end)
            self._sources[index].read(
                out[end : end + count], 0, 1, turn * self._lengths[index] * width + element - begin
            )
            position, end = position + count, end + count


def _turns(out: Tensor, position: int, length: int) -> Iterator[tuple[Tensor, int]]:
    """Split `out`, which begins at `position`, at multiples of `length`; yield each part and its position."""
    done = 0
    while done < len(out):
        count = min(length - position % length, len(out) - done)
        yield out[done : done + count], position
        done, position = done + count, position + count
