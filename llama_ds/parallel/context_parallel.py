"""Context parallelism on process groups: messages around a ring, and all-to-alls between tokens and heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ds.config.context_parallel import CpSizes
from llama_ds.model.tensor_parallel import Pending
from llama_ds.parallel.messages import exchange
from llama_ds.parallel.tensor_parallel import all_gather_flat
from llama_ds.parallel.trace import Trace


class CpGroups(NamedTuple):
    """The process groups of a rank; for a ring or all-to-alls alone, the other of the two has one rank."""

    whole: dist.ProcessGroup
    ring: dist.ProcessGroup
    all_to_all: dist.ProcessGroup


class GroupContextParallel:
    """`llama_ds.model.context_parallel.ContextParallel` on process groups."""

    def __init__(self, groups: CpGroups, sizes: CpSizes, trace: Trace | None = None) -> None:
        self.groups, self.sizes = groups, sizes
        self.trace = trace or Trace(torch.device("cpu"))  # never started
        self.rank, self.size = dist.get_rank(groups.whole), dist.get_world_size(groups.whole)
        ranks, own = dist.get_process_group_ranks(groups.ring), dist.get_rank(groups.ring)
        self._next, self._previous = ranks[(own + 1) % len(ranks)], ranks[own - 1]

    def start_pass(self, x: Tensor) -> Pending:
        x, received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        handles = exchange([(received, self._previous)], [(x, self._next)], self.groups.ring)
        watched = self.trace.watch("cp", handles[0], x.nbytes)

        def wait() -> Tensor:
            trace = self.trace
            begin = trace.now()
            for handle in handles:
                handle.wait()
            if trace.recording:
                trace.done("cp", watched, x.nbytes)
                trace.add("wait cp", begin)
            return received

        return wait

    def all_to_all(self, x: Tensor) -> Tensor:
        x, received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        begin = self.trace.now()
        dist.all_to_all_single(received, x, group=self.groups.all_to_all)
        self._record(begin, x.nbytes)
        return received

    def all_gather(self, x: Tensor) -> Tensor:
        parts = x.new_empty(self.size, *x.shape)
        begin = self.trace.now()
        all_gather_flat(parts.view(-1), x.contiguous().view(-1), group=self.groups.whole)
        self._record(begin, parts.nbytes)
        return parts

    def _record(self, begin: object, size: int) -> None:
        if self.trace.recording:
            self.trace.add("cp", begin, size=size)
            self.trace.add("wait cp", begin)
