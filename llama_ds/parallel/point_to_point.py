"""Asynchronous messages between pipeline ranks: sends return at once, receives use buffers posted in advance.

Each kind and direction has its own process group: NCCL executes the messages of a pair of ranks in one group in order,
so an activation would wait for a gradient that has not been sent yet.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ds.parallel import messages
from llama_ds.schedules.communication import Message
from llama_ds.schedules.instructions import Placement

Work = tuple[list[Any], Sequence[Tensor]]
MAX_PENDING_SENDS = 1  # earlier sends of a channel that may be in flight when the next is issued


class PipelineComm:
    """One rank's messages to and from the other ranks of its pipeline."""

    def __init__(self, columns: Sequence[Sequence[int]], placement: Placement, device: torch.device) -> None:
        """`columns` lists the global ranks of every pipeline of the run in stage order. Collective."""
        channels = sorted(_channels(placement))
        self._groups: dict[tuple[str, bool], dist.ProcessGroup] = {}
        self._ranks: Sequence[int] = ()
        self._sends: dict[tuple[str, int, int], deque[Work]] = defaultdict(deque)
        for ranks in columns:
            for kind in sorted({(kind, target > source) for kind, source, target in channels}):
                group = dist.new_group(list(ranks))
                if dist.get_rank() in ranks:
                    self._groups[kind], self._ranks = group, ranks
        self._connect(channels, torch.zeros(1, device=device))

    def _connect(self, channels: Sequence[tuple[str, int, int]], nothing: Tensor) -> None:
        """Exchange a first message over every channel, one after the other.

        NCCL creates a channel's communicator on its first message and blocks the host until both ends have joined.
        """
        me = self._ranks.index(dist.get_rank())
        for kind, source, target in channels:
            group = self._groups[kind, target > source]
            if me == source:
                messages.send(nothing, self._ranks[target], group).wait()
            if me == target:
                messages.receive(nothing, self._ranks[source], group).wait()

    def _group(self, message: Message) -> dist.ProcessGroup:
        return self._groups[message.kind, message.target > message.source]

    def post(self, message: Message, buffers: Sequence[Tensor]) -> Work:
        """Post the receives of `message` into `buffers`; return their handles and buffers."""
        group, peer = self._group(message), self._ranks[message.source]
        return [messages.receive(buffer, peer, group) for buffer in buffers], buffers

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        """Start sending `tensors`, which are kept alive until they are sent."""
        group, peer = self._group(message), self._ranks[message.target]
        earlier = self._sends[message.channel]
        while len(earlier) > MAX_PENDING_SENDS:
            wait(earlier.popleft())
        earlier.append(([messages.send(tensor, peer, group) for tensor in tensors], tensors))

    def finish(self) -> None:
        """Wait until all sends are complete."""
        for sends in self._sends.values():
            while sends:
                wait(sends.popleft())


def _channels(placement: Placement) -> set[tuple[str, int, int]]:
    """Return the channels that a schedule with `placement` uses: (kind, sending rank, receiving rank)."""
    homes = [placement.home(stage)[0] for stage in range(placement.stages)]
    there = {("activation", a, b) for a, b in pairwise(homes) if a != b}
    return there | {("grad", b, a) for _, a, b in there}


def wait(work: Work) -> Sequence[Tensor]:
    """Wait for a message and return its tensors."""
    handles, tensors = work
    for handle in handles:
        handle.wait()
    return tensors
