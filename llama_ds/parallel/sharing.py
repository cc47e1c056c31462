"""One rank of a host reads for the ranks beside it that need the same batches, and broadcasts them over gloo.

The tensor-parallel ranks of an end of the model need the same rows, and so do both ends where one host holds them. All
of it happens in the threads that read ahead: no step waits for it unless the data is late.
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

END = -1
PATIENCE = timedelta(days=30)  # a thread waits through evaluations, checkpoints and whatever else holds a step up


@dataclass(frozen=True)
class Neighbours:
    """Ranks of one host that read the same batches."""

    ranks: list[int]  # the first one reads
    group: dist.ProcessGroup | None  # None: this rank is alone

    @property
    def reads(self) -> bool:
        """Whether this rank is the one that reads."""
        return not dist.is_initialized() or dist.get_rank() == self.ranks[0]


def find_neighbours(needs_data: bool, dp_rank: int) -> Neighbours:
    """Return the ranks that this one shares batches with. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Neighbours([0], None)
    places = world.gather((needs_data, dp_rank, socket.gethostname()))
    own, group = [dist.get_rank()], None
    for place in sorted({place for place in places if place[0]}):
        ranks = [rank for rank, other in enumerate(places) if other == place]
        if len(ranks) > 1:
            made = dist.new_group(ranks, timeout=PATIENCE, backend="gloo")
            if dist.get_rank() in ranks:
                own, group = ranks, made
    return Neighbours(own, group)


def share(
    batches: Iterator[np.ndarray] | None, count: int, shape: tuple[int, ...], neighbours: Neighbours
) -> Iterator[np.ndarray]:
    """Yield `count` int32 batches of `shape`: read from `batches` where this rank reads, else from the one that does.

    Where `batches` end before, as in a run that is asked to end, so do all neighbours'.

    Raises:
        UserError: the reading rank could not read, on all its neighbours alike.
    """
    if neighbours.group is None:
        assert batches is not None
        yield from batches
    elif batches is not None:
        yield from _hand_out(batches, count, shape, neighbours)
    else:
        yield from _take(count, shape, neighbours)


def _hand_out(
    batches: Iterator[np.ndarray], count: int, shape: tuple[int, ...], to: Neighbours
) -> Iterator[np.ndarray]:
    # The length of an error, 0 where there is none, END where no more batches come; the batch.
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


def _take(count: int, shape: tuple[int, ...], source: Neighbours) -> Iterator[np.ndarray]:
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
