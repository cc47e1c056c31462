"""The interface of tensor parallelism that the model uses, and its implementation for a single rank.

Shapes: B rows, T tokens of a row, D hidden size, tp ranks of the group, S = T / tp under sequence parallelism, else T.
N = B * T and M = B * S tokens as rows of a matrix. Under sequence parallelism the N tokens are cut into chunks, and
each chunk into tp parts, one for each rank: a rank's M tokens are its parts of all chunks. The gather of a part is then
a chunk of the whole, in order, and a layer can multiply it while another travels (`chunked_products.py`).

The collectives are in `llama_ds.parallel.tensor_parallel`; this module does not depend on process groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

Pending = Callable[[], Tensor]  # a collective in flight: calling it waits for the result


class TensorParallel(Protocol):
    """One rank's view of its tensor-parallel group (Shoeybi 2019, section 3; Korthikanti 2022, section 4.2)."""

    rank: int
    size: int
    sequence_parallel: bool

    def chunks_of(self, tokens: int) -> int:
        """Return into how many chunks M or N `tokens` are cut; 1 if they cannot be."""

    def enter(self, x: Tensor) -> Tensor:
        """Give every rank the full input of a column-parallel matrix: (B, S, D) -> (B, T, D).

        Forward: identity, or all-gather over the sequence. Backward: all-reduce, or reduce-scatter.
        """

    def leave(self, x: Tensor) -> Tensor:
        """Sum the partial outputs of a row-parallel matrix: (B, T, D) -> (B, S, D).

        Forward: all-reduce, or reduce-scatter over the sequence. Backward: identity, or all-gather.
        """

    def replicated(self, weight: Tensor) -> Tensor:
        """Pass on a replicated weight that each rank applies to its own tokens (the norms).

        Forward: identity. Backward: all-reduce under sequence parallelism, where each rank saw only S tokens.
        """

    def start_gather(self, x: Tensor) -> Pending:
        """Issue the gather of `enter`'s forward and `leave`'s backward: (B, S, D) -> (B, T, D). Not differentiable."""

    def start_reduce(self, x: Tensor) -> Pending:
        """Issue the sum of `leave`'s forward and `enter`'s backward: (B, T, D) -> (B, S, D); it may overwrite x."""

    def gather_tokens(self, x: Tensor, out: Tensor | None, chunks: int = 1) -> Pending:
        """Issue `start_gather` for a rank's parts x of so many chunks: (M, D) -> (N, D), written to `out` if given.

        Without sequence parallelism the result is x.
        """

    def reduce_tokens(self, x: Tensor, out: Tensor | None, chunks: int = 1) -> Pending:
        """Issue `start_reduce` for so many chunks x: (N, D) -> (M, D), written to `out` if given.

        Without sequence parallelism the result is x, summed in place by one collective.
        """

    def start_sum(self, x: Tensor) -> Pending:
        """Issue the sum over ranks of a replicated weight's gradient; the identity without sequence parallelism."""

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over the group; not differentiable."""

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Return the elementwise sum over the group; not differentiable."""


class SingleRank:
    """Tensor parallelism of size one: every operation is the identity."""

    rank = 0
    size = 1
    sequence_parallel = False

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, x: Tensor) -> Tensor:
        return x

    def replicated(self, weight: Tensor) -> Tensor:
        return weight

    def chunks_of(self, tokens: int) -> int:
        return 1

    def start_gather(self, x: Tensor) -> Pending:
        return lambda: x

    start_reduce = start_sum = start_gather

    def gather_tokens(self, x: Tensor, out: Tensor | None, chunks: int = 1) -> Pending:
        return lambda: x

    reduce_tokens = gather_tokens

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return x

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return x


@contextmanager
def no_sequence_parallel(tp: TensorParallel) -> Iterator[None]:
    """Turn sequence parallelism off inside: every rank has all tokens, S = T, as for rows of a single token."""
    before = tp.sequence_parallel
    tp.sequence_parallel = False
    try:
        yield
    finally:
        tp.sequence_parallel = before
