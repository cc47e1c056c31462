"""Messages between two ranks, also between ranks that share a GPU.

Such ranks communicate by gloo, because NCCL refuses them. gloo copies the CUDA tensors of its collectives through host
memory by itself (torch's ProcessGroupGloo.cpp: all-reduce, broadcast, all-gather, reduce-scatter, all-to-all), but its
sends and receives take addresses of host memory only. There a message is copied here, and the host waits for the copy:
what such ranks compute matters, not their speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Message = tuple[Tensor, int]  # with the global rank that it goes to or comes from
Group = dist.ProcessGroup | None


class Handle(Protocol):
    """A message in flight."""

    def wait(self) -> object:
        """Wait until a sent tensor may change, or a received one is complete."""


def send(tensor: Tensor, to: int, group: Group) -> Handle:
    """Start sending `tensor`, which must not change until the handle has been waited for."""
    work = dist.isend(tensor.cpu() if _through_host(tensor, group) else tensor, to, group=group)
    assert work is not None  # for a rank that is not in the group
    return work


def receive(buffer: Tensor, source: int, group: Group) -> Handle:
    """Post a receive into `buffer`."""
    return _StagedReceive(buffer, source, group) if _through_host(buffer, group) else _posted(buffer, source, group)


def exchange(received: Sequence[Message], sent: Sequence[Message], group: Group) -> Sequence[Handle]:
    """Start messages of which each may need another one of them to be under way; return their handles.

    NCCL gets them as one batch: it would run a send before the receive that it waits for, and so would its neighbours.
    Receives come first: gloo tells the sender of them, between two ranks on the connection that our data fills.
    """
    if any(_through_host(tensor, group) for tensor, _ in received):
        return [receive(*message, group) for message in received] + [send(*message, group) for message in sent]
    calls = [dist.P2POp(dist.irecv, *message, group) for message in received]
    return dist.batch_isend_irecv(calls + [dist.P2POp(dist.isend, *message, group) for message in sent])


def _through_host(tensor: Tensor, group: Group) -> bool:
    return tensor.is_cuda and dist.get_backend(group) == "gloo"


def _posted(buffer: Tensor, source: int, group: Group) -> Handle:
    work = dist.irecv(buffer, source, group=group)
    assert work is not None  # for a rank that is not in the group
    return work


class _StagedReceive:
    """A receive into host memory; waiting for it fills the buffer, in the order of the current stream."""

    def __init__(self, buffer: Tensor, source: int, group: Group) -> None:
        self._buffer, self._host = buffer, torch.empty_like(buffer, device="cpu")
        self._handle = _posted(self._host, source, group)

    def wait(self) -> None:
        self._handle.wait()
        self._buffer.copy_(self._host)
