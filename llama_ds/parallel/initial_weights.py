"""DeepSpeed's broadcast of the initial weights, in few collectives instead of one for each weight.

At a start every rank waits for the slowest one in each: 21 times for two layers, 291 times for 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import groups
from torch import Tensor

BUCKET_BYTES = 1 << 26


@contextmanager
def broadcast_in_buckets() -> Iterator[None]:
    """Let DeepSpeed's engines that are built inside copy the weights of the first data-parallel rank in buckets."""
    before = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = _broadcast
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = before


def _broadcast(engine: Any) -> None:
    """Do what `DeepSpeedEngine._broadcast_model` does for a model without experts. Collective."""
    if dist.get_world_size(engine.seq_data_parallel_group) == 1:
        return
    available = ZeroParamStatus.AVAILABLE  # ZeRO-3 has broadcast each weight before it partitioned it
    weights = [p.data for p in engine.module.parameters() if getattr(p, "ds_status", available) is available]
    for bucket in _buckets([weight.view(-1).view(torch.uint8) for weight in weights]):
        flat = torch.cat(bucket) if len(bucket) > 1 else bucket[0]  # a large weight is not copied
        dist.broadcast(flat, groups._get_broadcast_src_rank(), group=engine.seq_data_parallel_group)
        for weight, sent in zip(bucket, flat.split([len(one) for one in bucket]), strict=True):
            if len(bucket) > 1:
                weight.copy_(sent)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield consecutive tensors of up to BUCKET_BYTES together, at least one."""
    bucket, size = list[Tensor](), 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
