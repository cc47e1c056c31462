"""Reading of weights and optimizer states from files into the tensors of an engine."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_ds.checkpoint.conversion.digest import surely_finite
from llama_ds.checkpoint.weights import Readable
from llama_ds.config.rules import NONFINITE
from llama_ds.errors import UserError
from llama_ds.layout.weights import Key

READ_ELEMENTS = 16 << 20  # chunk size of reads into device memory: 64 MiB of fp32


def read_part(source: Readable, target: Tensor, rank: int, size: int, start: int) -> None:
    """Fill `target`, on any device, with elements of the shard of rank `rank` of `size`, from `start` on."""
    if target.device.type == "cpu" and target.is_contiguous():
        source.read(target, rank, size, start)
        return
    buffer = torch.empty(min(target.numel(), READ_ELEMENTS), dtype=target.dtype, pin_memory=target.is_cuda)
    for begin in range(0, target.numel(), READ_ELEMENTS):
        part = target[begin : begin + READ_ELEMENTS]
        source.read(buffer[: len(part)], rank, size, start + begin)
        part.copy_(buffer[: len(part)])


def check_finite(path: str, key: Key, part: Tensor) -> None:
    """Check that a part of a weight of the model at `path` has neither NaN nor infinity.

    Raises:
        UserError: it has.
    """
    if not part.numel() or surely_finite(part) or part.isfinite().all():
        return
    raise UserError(
        f"{path}: layer {key[0]} {key[1]} holds NaN or infinity, so the model is damaged; give another checkpoint, or "
        f"start from it as it is: checkpoint.start_from_changes=[{NONFINITE}]"
    )
