"""Objects of all ranks, most of them in one collective.

`torch.distributed.all_gather_object` has two, for the lengths and for the objects. Each is a chance to wait for a rank
that its system has not scheduled, and a start gathers dozens of small values.
"""

from __future__ import annotations

import pickle
import struct
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_LENGTH = struct.Struct("!Q")
_WITH_LENGTH = 248  # bytes of an object that travel with its length


def gather_objects(value: T, where: torch.device) -> list[T]:
    """Return the values of all ranks, which must be picklable. Collective; synchronises with the device `where`."""
    own = pickle.dumps(value)
    heads = gather_bytes(_LENGTH.pack(len(own)) + own[:_WITH_LENGTH], _LENGTH.size + _WITH_LENGTH, where)
    lengths = [_LENGTH.unpack_from(head)[0] for head in heads]
    rest = max(lengths) - _WITH_LENGTH
    tails = gather_bytes(own[_WITH_LENGTH:], rest, where) if rest > 0 else [b""] * len(heads)
    texts = zip(heads, tails, lengths, strict=True)
    return [pickle.loads((head[_LENGTH.size :] + tail)[:length]) for head, tail, length in texts]


def gather_bytes(own: bytes, size: int, where: torch.device) -> list[bytes]:
    """Return the bytes of all ranks, each filled up to `size` with zeros. Collective."""
    given = torch.frombuffer(bytearray(own.ljust(size, b"\0")), dtype=torch.uint8).to(where)
    return [row.tobytes() for row in gather_rows(given)]


def gather_rows(own: Tensor) -> np.ndarray:
    """Return the tensors of all ranks, `own` (n), as rows: (world, n). Collective; synchronises with its device."""
    every = own.new_empty(dist.get_world_size() * len(own))
    dist.all_gather_into_tensor(every, own)
    return every.view(-1, len(own)).cpu().numpy()
