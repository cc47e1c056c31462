"""Tensor and sequence parallelism on a process group: the collectives between column- and row-parallel matrices.

Shapes: B rows, T tokens, D hidden size, tp ranks; S = T / tp under sequence parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ds.model.tensor_parallel import Pending
from llama_ds.parallel.trace import Trace

# torch 2.13 renamed both and warns about the old names, the only ones in 2.11.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class GroupTensorParallel:
    """`llama_ds.model.tensor_parallel.TensorParallel` on a process group."""

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool, trace: Trace | None = None) -> None:
        self.group = group
        self.trace = trace or Trace(torch.device("cpu"))  # never started
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.sequence_parallel = sequence_parallel
        self._last_gather: tuple[Tensor, Pending] | None = None

    def enter(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self) if self.sequence_parallel else _Copy.apply(x, self)

    def leave(self, x: Tensor) -> Tensor:
        return _Scatter.apply(x, self) if self.sequence_parallel else _Sum.apply(x, self)

    def replicated(self, weight: Tensor) -> Tensor:
        # One all-reduce of D numbers per norm and micro-batch. Doing it here is correct for every ZeRO stage.
        return _Copy.apply(weight, self) if self.sequence_parallel else weight

    def start_gather(self, x: Tensor) -> Pending:
        if not self.sequence_parallel:
            return lambda: x
        if self._last_gather and self._last_gather[0].data_ptr() == x.data_ptr():
            pending = self._last_gather[1]
            self._last_gather = None
            return pending
        return self._issue_gather(x)

    def gather_ahead(self, x: Tensor) -> None:
        if self.sequence_parallel:
            self._last_gather = (x, self._issue_gather(x))  # holding x keeps its address from being reused

    def start_reduce(self, x: Tensor) -> Pending:
        return self._issue_scatter_sum(x) if self.sequence_parallel else self._issue_sum(x)

    def start_sum(self, x: Tensor) -> Pending:
        return self._issue_sum(x) if self.sequence_parallel else lambda: x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return self._all_reduce(x.clone(), dist.ReduceOp.MAX)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return self._all_reduce(x.clone(), dist.ReduceOp.SUM)

    def _all_reduce(self, x: Tensor, op: Any) -> Tensor:
        trace = self.trace
        begin = trace.now()
        dist.all_reduce(x, op=op, group=self.group)
        if trace.recording:
            trace.add("tp", begin, size=x.nbytes)
            trace.add("wait tp", begin)
        return x

    def _wait(self, work: dist.Work, watched: Any, size: int) -> None:
        trace = self.trace
        begin = trace.now()
        work.wait()
        if trace.recording:
            trace.done("tp", watched, size)
            trace.add("wait tp", begin)

    def _issue_gather(self, x: Tensor) -> Pending:
        """Concatenate the ranks' tokens: (B, S, D) -> (B, T, D)."""
        rows, tokens, width = x.shape
        parts = x.new_empty(self.size, rows, tokens, width)
        work = all_gather_flat(parts.view(-1), x.contiguous().view(-1), group=self.group, async_op=True)
        watched = self.trace.watch("tp", work, parts.nbytes)

        def wait() -> Tensor:
            self._wait(work, watched, parts.nbytes)
            return parts.transpose(0, 1).reshape(rows, -1, width)  # a view when B = 1

        return wait

    def _issue_scatter_sum(self, x: Tensor) -> Pending:
        """Sum over ranks and keep this rank's tokens: (B, T, D) -> (B, S, D)."""
        rows, tokens, width = x.shape
        own = tokens // self.size
        parts = x.view(rows, self.size, own, width).transpose(0, 1).contiguous()  # no copy when B = 1
        out = x.new_empty(rows, own, width)
        work = reduce_scatter_flat(out.view(-1), parts.view(-1), group=self.group, async_op=True)
        watched = self.trace.watch("tp", work, parts.nbytes)

        def wait() -> Tensor:
            self._wait(work, watched, parts.nbytes)
            return out

        return wait

    def _issue_sum(self, x: Tensor) -> Pending:
        """Sum over ranks, in place."""
        work = dist.all_reduce(x, group=self.group, async_op=True)
        watched = self.trace.watch("tp", work, x.nbytes)

        def wait() -> Tensor:
            self._wait(work, watched, x.nbytes)
            return x

        return wait


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: GroupTensorParallel) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.all_reduce_sum(grad.contiguous()), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: GroupTensorParallel) -> Tensor:
        return tp.all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: GroupTensorParallel) -> Tensor:
        ctx.tp = tp
        return tp.start_gather(x)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.start_reduce(grad.contiguous())(), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: GroupTensorParallel) -> Tensor:
        ctx.tp = tp
        return tp.start_reduce(x.contiguous())()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.start_gather(grad)(), None
