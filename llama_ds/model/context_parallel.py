"""The interface of context parallelism that the model uses, and its implementation for ranks that hold whole rows.

Shapes: B rows, T tokens of a row, n ranks of the group, S = T / n. Which tokens a rank holds: `layout/row_cuts.py`. The
messages are in `llama_ds.parallel.context_parallel`; this module does not depend on process groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from llama_ds.config.context_parallel import WHOLE_ROWS, CpSizes
from llama_ds.layout.row_cuts import own_ranges
from llama_ds.model.tensor_parallel import Pending


class ContextParallel(Protocol):
    """One rank's view of the ranks that share its rows. Nothing here is differentiable."""

    rank: int
    size: int
    sizes: CpSizes  # rank r is member r % all_to_all of group r // all_to_all

    def start_pass(self, x: Tensor) -> Pending:
        """Send x to this member of the next group; the returned call waits, and returns that of the previous group.

        x must not change before that call.
        """

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send part i of x (all_to_all, ...) to member i of this group; return the parts of all members, in order."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the tensors of all ranks, in their order: (...) -> (n, ...)."""


class WholeRows:
    """Context parallelism of size one."""

    rank = 0
    size = 1
    sizes = WHOLE_ROWS

    def start_pass(self, x: Tensor) -> Pending:
        return lambda: x

    def all_to_all(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None]


@contextmanager
def rows_of_its_own(cp: ContextParallel) -> Iterator[None]:
    """Let this rank compute whole rows inside, other ones than those that it otherwise shares rows with."""
    before = cp.rank, cp.size, cp.sizes
    cp.rank, cp.size, cp.sizes = 0, 1, WHOLE_ROWS
    try:
        yield
    finally:
        cp.rank, cp.size, cp.sizes = before


def positions(tokens: int, cp: ContextParallel, rank: int) -> Tensor:
    """Return the positions (S,) in rows of `tokens` that rank `rank` of the group holds."""
    return torch.cat([torch.arange(part.start, part.stop, part.step) for part in own_ranges(tokens, rank, cp.sizes)])


def whole_rows(x: Tensor, cp: ContextParallel) -> Tensor:
    """Gather whole rows from the ranks' tokens: (B, S) -> (B, T)."""
    if cp.size == 1:
        return x
    parts, tokens = cp.all_gather(x.contiguous()), x.shape[1] * cp.size
    order = torch.cat([positions(tokens, cp, rank) for rank in range(cp.size)]).to(x.device)
    whole = x.new_empty(x.shape[0], tokens)
    whole[:, order] = parts.transpose(0, 1).flatten(1)
    return whole
