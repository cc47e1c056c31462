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
    """Sum `whole` (R, n) over ranks in `dtype` into this rank's `own` (n); the returned call waits for it.

    Each rank sends (R - 1) n elements. `own` may be a row of `whole`; `whole` is invalid afterwards.
    """
    wire = whole.to(dtype)
    parts = torch.empty_like(wire) if dist.get_backend(group) == "gloo" else own.new_empty(own.shape, dtype=dtype)
    if dist.get_backend(group) == "gloo":
        # gloo implements reduce-scatter as an all-reduce of twice the bytes: exchange the parts and add them here.
        work = dist.all_to_all_single(parts.view(-1), wire.view(-1), group=group, async_op=True)
    else:
        parts = own if own.dtype == dtype else parts
        work = reduce_scatter_flat(parts, wire.view(-1), group=group, async_op=True)

    watched = trace.watch("reduce", work, wire.nbytes)

    def wait() -> None:
        work.wait()
        trace.done("reduce", watched, wire.nbytes)
        if parts.dim() > own.dim():
            torch.sum(parts, 0, dtype=own.dtype, out=own)
        elif parts is not own:
            own.copy_(parts)

    return wait


def start_all_gather(whole: Tensor, own: Tensor, group: dist.ProcessGroup, trace: Trace) -> Wait:
    """Gather all ranks' `own` (n), which may be a row of `whole`, into `whole` (R, n)."""
    work = all_gather_flat(whole.view(-1), own, group=group, async_op=True)

    watched = trace.watch("gather", work, whole.nbytes)

    def wait() -> None:
        work.wait()
        trace.done("gather", watched, whole.nbytes)

    return wait
