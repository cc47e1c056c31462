"""A rank's optimizer state as bytes: what a file of `job/memory_slots.py` holds.

The payload begins with the optimizer's count of steps (float64). This rank's fragments of the masters follow, then
those of each kind of moment, each fragment aligned to `ALIGNED` bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from llama_ds.checkpoint.snapshot import copied_event
from llama_ds.job.memory_slots import MemorySlot
from llama_ds.layout.optimizer_states import MASTER, OptimizerStates
from llama_ds.layout.weights import key_of, weight_of
from llama_ds.parallel.optimizer_state import fragments, step_counter

ALIGNED = 64  # bytes
FINITE_ELEMENTS = 1 << 22  # checked at once


def payload_bytes(engine: Any, states: OptimizerStates) -> int:
    """Return the size of this rank's payload, also before the optimizer has moments."""
    total = ALIGNED
    for fragment in fragments(engine):
        kinds = states.kinds(weight_of(key_of(fragment.name)[1]).role)
        total += sum(_aligned(fragment.numel * states.state_bytes(kind)) for kind in kinds)
    return total


def has_moments(engine: Any) -> bool:
    """Return whether the optimizer has moments; it has none before its first finite step."""
    return all(len(fragment.tensors) > 1 for fragment in islice(fragments(engine), 1))


def write(engine: Any, payload: memoryview) -> tuple[dict[str, Any], Any]:
    """Copy this rank's state into a payload.

    Returns:
        What `read` and `problem` need in its header, and the CUDA event after the copies, None on a CPU.
    """
    counter = step_counter(engine)
    _count(payload).copy_(counter if isinstance(counter, Tensor) else torch.tensor(counter), non_blocking=True)
    for source, stored in _placed(engine, payload):
        stored.copy_(source, non_blocking=True)
    masters = [fragment.tensors[MASTER] for fragment in fragments(engine)]
    dtypes = [str(master.dtype).removeprefix("torch.") for master in masters[:1]]  # all have the same
    about = {"signature": _signature(engine), "masters": sum(_aligned(m.nbytes) for m in masters), "dtypes": dtypes}
    return about, copied_event(masters)


def read(engine: Any, slot: MemorySlot) -> bool:
    """Copy a state into this rank's optimizer, which has moments; return False if it is of other elements."""
    header = slot.header
    if header is None or header["signature"] != _signature(engine):
        return False
    for target, stored in _placed(engine, slot.payload):
        target.copy_(stored)
    return True


def step_count(slot: MemorySlot) -> int:
    """Return the optimizer's count of steps of a state."""
    return int(_count(slot.payload))


def problem(slot: MemorySlot) -> str:
    """Return why a state cannot be used, "" if it can."""
    header = slot.header
    if header is None or not slot.is_intact:
        return "its bytes do not have their checksum"
    for dtype in header["dtypes"]:
        kept = slot.payload[ALIGNED : ALIGNED + header["masters"]]
        masters = torch.frombuffer(kept, dtype=getattr(torch, dtype))
        if not all(bool(part.isfinite().all()) for part in masters.split(FINITE_ELEMENTS)):
            return "it has weights that are not finite"
    return ""


def _placed(engine: Any, payload: memoryview) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's tensors, each with its place in the payload."""
    every, at = list(fragments(engine)), ALIGNED
    for kind in sorted({kind for fragment in every for kind in fragment.tensors}, key=lambda k: (k != MASTER, k)):
        for fragment in every:
            if (tensor := fragment.tensors.get(kind)) is not None:
                yield tensor, torch.frombuffer(payload, dtype=tensor.dtype, count=tensor.numel(), offset=at)
                at += _aligned(tensor.nbytes)


def _count(payload: memoryview) -> Tensor:
    return torch.frombuffer(payload, dtype=torch.float64, count=1)


def _signature(engine: Any) -> str:
    """Return a hash of which elements this rank's state has, and in which order."""
    digest = hashlib.sha256()
    for fragment in fragments(engine):
        kinds = [(kind, str(tensor.dtype)) for kind, tensor in sorted(fragment.tensors.items())]
        digest.update(f"{fragment.name} {fragment.start} {fragment.numel} {kinds}\n".encode())
    return digest.hexdigest()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED
