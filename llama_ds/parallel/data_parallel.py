"""Asynchronous reduce-scatter and all-gather over data-parallel ranks.

Shapes: R ranks, n elements of a rank's part; a full buffer is (R, n), with row r the part of rank r.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ds.parallel.tensor_parallel import all_gather_flat, reduce_scatter_flat
from llama_ds.parallel.trace import Trace

Wait = Callable[[], None]


def start_reduce_scatter(
    whole: Tensor, own: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, trace: Trace
) -> Wait:
    """Sum `whole` (R, n) over ranks into this rank's `own` (n), sent in `dtype`; the returned call waits for it.

    Each rank sends (R - 1) n elements. `own` may be a row of `whole`, which is contiguous; `whole` is invalid
    afterwards. Elements that are sent in a narrower dtype are rounded once, by their sender: the owner adds them in its
    own dtype, where a reduce-scatter would round R - 1 partial sums.
    """
    narrower = dtype.itemsize < own.dtype.itemsize
    # gloo implements reduce-scatter as an all-reduce of twice the bytes: exchange the parts and add them here.
    exchanged = narrower or dist.get_backend(group) == "gloo"
    if narrower:
        wire, parts = _in_place(whole, dtype)
    elif exchanged:
        wire = whole.to(dtype)
        parts = torch.empty_like(wire)
    else:
        wire, parts = whole.to(dtype), own if own.dtype == dtype else own.new_empty(own.shape, dtype=dtype)
    if exchanged:
        work = dist.all_to_all_single(parts.view(-1), wire.view(-1), group=group, async_op=True)
    else:
        work = reduce_scatter_flat(parts, wire.view(-1), group=group, async_op=True)

    watched = trace.watch("reduce", work, wire.nbytes)

    def wait() -> None:
        work.wait()
        trace.done("reduce", watched, wire.nbytes)
        if exchanged and not narrower:
            torch.sum(parts, 0, dtype=own.dtype, out=own)
        elif parts is not own:  # `own` may share memory with narrower parts
            own.copy_(torch.sum(parts, 0, dtype=own.dtype) if exchanged else parts)

    return wait


class NearFirst:
    """A reduction in two parts: in the gradients' dtype over neighbours, in a narrower one over their peers.

    R = near * far ranks in two groups as `grid.neighbour_groups` makes them; otherwise as `start_reduce_scatter`.
    """

    def __init__(
        self,
        whole: Tensor,
        own: Tensor,
        groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
        dtype: torch.dtype,
        trace: Trace,
    ) -> None:
        near, far = (dist.get_world_size(group) for group in groups)
        peers = whole.view(far, near, -1).transpose(0, 1).contiguous()  # what each neighbour passes on
        self._sums = whole.view(-1)[: whole.numel() // near].view(far, -1)  # `whole` is no longer needed
        self._near: Wait | None = start_reduce_scatter(
            peers.view(near, -1), self._sums.view(-1), groups[0], whole.dtype, trace
        )
        self._far: Wait = lambda: None
        self._rest = own, groups[1], dtype, trace

    def advance(self) -> None:
        """Wait for the sums over neighbours, and send them on."""
        if self._near:
            self._near()
            self._near = None  # frees what has been sent
            self._far = start_reduce_scatter(self._sums, *self._rest)

    def __call__(self) -> None:
        """Wait for the whole."""
        self.advance()
        self._far()


def _in_place(whole: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `whole` (R, n) in a dtype of half its size, and room for as much, both in its memory.

    Copies would be kept until the step, as large as all buffers of gradients.
    """
    wire, room = whole.view(dtype).view(2, *whole.shape)
    wire.copy_(whole.to(dtype))
    return wire, room


def start_all_gather(whole: Tensor, own: Tensor, group: dist.ProcessGroup, trace: Trace) -> Wait:
    """Gather all ranks' `own` (n), which may be a row of `whole`, into `whole` (R, n)."""
    work = all_gather_flat(whole.view(-1), own, group=group, async_op=True)

    watched = trace.watch("gather", work, whole.nbytes)

    def wait() -> None:
        work.wait()
        trace.done("gather", watched, whole.nbytes)

    return wait
