"""What the model asks of tensor parallelism: an interface handed in, and the one that stands for a single rank.

Shapes: B rows, T tokens of a row, D hidden size, tp ranks of the group, S = T / tp under sequence parallelism, else T.
The collectives live in `llama_ds.parallel.tensor_parallel`; nothing here knows of process groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Pending = Callable[[], Tensor]  # a collective under way: the call waits for its result


class TensorParallel(Protocol):
    """One rank's view of its tensor-parallel group (Shoeybi 2019, section 3; Korthikanti 2022, section 4.2)."""

    rank: int
    size: int
    sequence_parallel: bool

    def enter(self, x: Tensor) -> Tensor:
        """Give every rank the whole input of a column-parallel matrix: (B, S, D) -> (B, T, D).

        Forward: identity, or all-gather over the sequence. Backward: all-reduce, or reduce-scatter.
        """

    def leave(self, x: Tensor) -> Tensor:
        """Sum the partial outputs of a row-parallel matrix: (B, T, D) -> (B, S, D).

        Forward: all-reduce, or reduce-scatter over the sequence. Backward: identity, or all-gather.
        """

    def replicated(self, weight: Tensor) -> Tensor:
        """Pass a weight that every rank holds whole and applies to its own tokens (the norms).

        Forward: identity. Backward: all-reduce under sequence parallelism, where each rank saw only S tokens.
        """

    def start_gather(self, x: Tensor) -> Pending:
        """Issue what `enter` does forward and `leave` backward: (B, S, D) -> (B, T, D). Not differentiable."""

    def gather_ahead(self, x: Tensor) -> None:
        """Issue now the gather of x that will be asked for next: that `start_gather` takes the one under way."""

    def start_reduce(self, x: Tensor) -> Pending:
        """Issue what `leave` does forward and `enter` backward: (B, T, D) -> (B, S, D), x given up to it."""

    def start_sum(self, x: Tensor) -> Pending:
        """Issue the sum over ranks of a replicated weight's gradient under sequence parallelism; else nothing."""

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

    def start_gather(self, x: Tensor) -> Pending:
        return lambda: x

    start_reduce = start_sum = start_gather

    def gather_ahead(self, x: Tensor) -> None:
        pass

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return x

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return x
