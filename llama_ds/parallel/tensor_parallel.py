"""Tensor and sequence parallelism on a process group: the collectives between column- and row-parallel matrices.

Shapes: B rows, T tokens, D hidden size, tp ranks; S = T / tp under sequence parallelism. N = B * T, M = B * S.
`llama_ds.model.tensor_parallel` says which tokens a rank has.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ds.model.chunked_products import cut
from llama_ds.model.tensor_parallel import Pending
from llama_ds.parallel.trace import Trace

# torch 2.13 renamed both and warns about the old names, the only ones in 2.11.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class GroupTensorParallel:
    """`llama_ds.model.tensor_parallel.TensorParallel` on a process group."""

    def __init__(
        self, group: dist.ProcessGroup, sequence_parallel: bool, trace: Trace | None = None, chunks: int = 1
    ) -> None:
        """`chunks`: into how many chunks tokens are cut where their number allows it."""
        self.group = group
        self.trace = trace or Trace(torch.device("cpu"))  # never started
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.sequence_parallel = sequence_parallel
        self._chunks = chunks

    def chunks_of(self, tokens: int) -> int:
        return self._chunks if tokens % self._chunks == 0 else 1

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
        rows, own, width = x.shape
        pending = self.gather_tokens(x.flatten(0, 1), None, self.chunks_of(rows * own))
        return lambda: pending().view(rows, -1, width)

    def start_reduce(self, x: Tensor) -> Pending:
        rows, tokens, width = x.shape
        own = rows * tokens // self.size if self.sequence_parallel else rows * tokens
        pending = self.reduce_tokens(x.flatten(0, 1), None, self.chunks_of(own))
        return lambda: pending().view(rows, -1, width)

    def gather_tokens(self, x: Tensor, out: Tensor | None, chunks: int = 1) -> Pending:
        if not self.sequence_parallel:
            return lambda: x
        whole = x.new_empty(len(x) * self.size, x.shape[1]) if out is None else out
        return _after_all(map(self._issue_gather, cut(x, chunks), cut(whole, chunks)), whole)

    def reduce_tokens(self, x: Tensor, out: Tensor | None, chunks: int = 1) -> Pending:
        if not self.sequence_parallel:
            return self._issue_sum(x)
        own = x.new_empty(len(x) // self.size, x.shape[1]) if out is None else out
        return _after_all(map(self._issue_scatter_sum, cut(x, chunks), cut(own, chunks)), own)

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

    def _issue_gather(self, x: Tensor, out: Tensor) -> Pending:
        """Concatenate the ranks' tokens: (m, D) -> (tp * m, D)."""
        x = x.contiguous()
        work = all_gather_flat(out.view(-1), x.view(-1), group=self.group, async_op=True)
        return self._waiting(work, out, out.nbytes)

    def _issue_scatter_sum(self, x: Tensor, out: Tensor) -> Pending:
        """Sum over ranks and keep this rank's tokens: (tp * m, D) -> (m, D)."""
        x = x.contiguous()
        work = reduce_scatter_flat(out.view(-1), x.view(-1), group=self.group, async_op=True)
        return self._waiting(work, out, x.nbytes)

    def _issue_sum(self, x: Tensor) -> Pending:
        """Sum over ranks, in place."""
        return self._waiting(dist.all_reduce(x, group=self.group, async_op=True), x, x.nbytes)

    def _waiting(self, work: dist.Work, result: Tensor, size: int) -> Pending:
        watched = self.trace.watch("tp", work, size)

        def wait() -> Tensor:
            self._wait(work, watched, size)
            return result

        return wait


def _after_all(issued: Iterable[Pending], result: Tensor) -> Pending:
    """Issue all; the returned function waits for them and returns their common `result`."""
    pending = list(issued)
    if len(pending) == 1:
        return pending[0]

    def wait() -> Tensor:
        for one in pending:
            one()
        return result

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
