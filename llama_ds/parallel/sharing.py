"""One rank of a host reads batches for all ranks of the host that need them, and broadcasts them over gloo.

The tensor-parallel ranks of the first and the last stage need the same rows, and so do both stages if one host holds
them. All of it happens in the prefetching threads: no step waits unless the data is late.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from llama_ds.errors import UserError
from llama_ds.parallel import world

END = -1  # header of the message after the last batch
TIMEOUT = timedelta(days=30)  # a prefetching thread waits through evaluations, checkpoints and other long pauses


@dataclass(frozen=True)
class Neighbours:
    """Ranks of one host that read the same batches."""

    ranks: list[int]  # the first one reads the data
    group: dist.ProcessGroup | None  # None: this rank is alone

    @property
    def reads(self) -> bool:
        """Whether this rank is the one that reads."""
        return not dist.is_initialized() or dist.get_rank() == self.ranks[0]


def find_neighbours(needs_data: bool, dp_rank: int) -> Neighbours:
    """Return the ranks that share batches with this one. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Neighbours([0], None)
    needs = world.gather((needs_data, dp_rank, socket.gethostname()))
    own, group = [dist.get_rank()], None
    for need in sorted({need for need in needs if need[0]}):
        ranks = [rank for rank, other in enumerate(needs) if other == need]
        if len(ranks) > 1:
            made = dist.new_group(ranks, timeout=TIMEOUT, backend="gloo")
            if dist.get_rank() in ranks:
                own, group = ranks, made
    return Neighbours(own, group)


def share(
    batches: Iterator[np.ndarray] | None, count: int, shape: tuple[int, ...], neighbours: Neighbours
) -> Iterator[np.ndarray]:
    """Yield `count` int32 batches of `shape`: from `batches` on the reading rank, else from its broadcasts.

    If `batches` end early, as in a run that is asked to end, the batches of all neighbours end too.

    Raises:
        UserError: the reading rank failed; all its neighbours raise the same error.
    """
    if neighbours.group is None:
        assert batches is not None
        yield from batches
    elif batches is not None:
        yield from _broadcast_all(batches, count, shape, neighbours)
    else:
        yield from _receive(count, shape, neighbours)


def _broadcast_all(
    batches: Iterator[np.ndarray], count: int, shape: tuple[int, ...], to: Neighbours
) -> Iterator[np.ndarray]:
    # Header: length of an error, 0 without one, or END after the last batch; then the batch.
    message = np.zeros(1 + math.prod(shape), np.int32)
    try:
        for batch in batches:
            message[1:] = batch.ravel()
            _broadcast(message, to)
            count -= 1
            yield batch
        if count:
            message[0] = END
            _broadcast(message, to)
    except UserError as error:
        text = np.frombuffer(str(error).encode(), np.uint8).copy()
        message[0] = len(text)
        _broadcast(message, to)
        _broadcast(text, to)
        raise


def _receive(count: int, shape: tuple[int, ...], source: Neighbours) -> Iterator[np.ndarray]:
    for _ in range(count):
        message = np.empty(1 + math.prod(shape), np.int32)
        _broadcast(message, source)
        if message[0] == END:
            return
        if message[0]:
            text = np.empty(message[0], np.uint8)
            _broadcast(text, source)
            raise UserError(text.tobytes().decode())
        yield message[1:].reshape(shape)


def _broadcast(values: np.ndarray, among: Neighbours) -> None:
    dist.broadcast(torch.from_numpy(values), src=among.ranks[0], group=among.group)
