"""Snapshots: state dicts copied to reusable host memory, and the positions of tensors within them.

Training waits only for this copy. The memory is as large as one copy of this rank's share of a checkpoint.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_ds.checkpoint.manifest import WEIGHT
from llama_ds.layout.weights import Key

OPTIMIZER_FILE = "optim_states"  # part of the name of every DeepSpeed file that holds ZeRO partitions


@dataclass(frozen=True)
class Located:
    """A tensor to be indexed in a checkpoint's files: elements `start` .. of a tensor-parallel part."""

    key: Key
    kind: str
    part: int
    start: int
    tensor: Tensor  # contiguous; skipped unless it shares memory with a saved tensor


@dataclass(frozen=True)
class Copied:
    """The position of a tensor in a snapshot."""

    wanted: Located
    file: str
    leaf: Tensor  # the copied tensor that contains it
    begin: int  # index of its first element in `leaf`


@dataclass(frozen=True)
class Snapshot:
    """The files to write, as trees that hold copies of the tensors."""

    files: dict[str, Any]
    copied: list[Copied]
    ready: Any = None  # CUDA event recorded after the copies; None on CPU


class HostMemory:
    """Host memory for snapshots, reused by every save."""

    def __init__(self) -> None:
        self._buffers: dict[str, list[Tensor]] = {}  # by file, in the order of the tensors in its tree

    @property
    def nbytes(self) -> int:
        """Total size of the buffers in bytes."""
        return sum(buffer.nbytes for buffers in self._buffers.values() for buffer in buffers)

    def take(self, files: Iterable[tuple[str, Any]], wanted: Iterable[Located]) -> Snapshot:
        """Copy the tensors of all `files` (name, tree). On CUDA the copies are asynchronous: wait for `ready`."""
        leaves: list[tuple[int, Tensor, str, Tensor]] = []  # address, tensor, file, copy
        copies = {}
        for name, tree in files:
            kept = self._buffers.get(name, [])
            used: list[Tensor] = []
            copies[name] = _map(tree, lambda tensor, k=kept, u=used: _copy(tensor, k, u))
            self._buffers[name] = used
            leaves += [(t.data_ptr(), t, name, c) for t, c in zip(tensors_in(tree), used, strict=True)]
        return Snapshot(copies, list(_locate(leaves, wanted)), copied_event(tensor for _, tensor, _, _ in leaves))


def copied_event(tensors: Iterable[Tensor]) -> Any:
    """Return an event after the copies of tensors that the current stream has been given; None if all are on a CPU."""
    return torch.cuda.current_stream().record_event() if any(tensor.is_cuda for tensor in tensors) else None


def _copy(tensor: Tensor, kept: list[Tensor], used: list[Tensor]) -> Tensor:
    if 0 in tensor.stride():  # a constant, which a copy would make as large as its shape
        used.append(tensor)
        return tensor
    index = len(used)
    if index < len(kept) and kept[index].shape == tensor.shape and kept[index].dtype == tensor.dtype:
        buffer = kept[index]
    else:
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    buffer.copy_(tensor.detach(), non_blocking=True)
    used.append(buffer)
    return buffer


def _locate(leaves: list[tuple[int, Tensor, str, Tensor]], wanted: Iterable[Located]) -> Iterator[Copied]:
    """Find the leaf whose memory contains each wanted tensor.

    In fp32 a weight may be its own master and so be saved twice; each kind is looked up in its own files first.
    """
    of_optimizer = sorted((x for x in leaves if OPTIMIZER_FILE in x[2]), key=lambda x: x[0])
    of_model = sorted((x for x in leaves if OPTIMIZER_FILE not in x[2]), key=lambda x: x[0])
    for item in wanted:
        first, second = (of_model, of_optimizer) if item.kind == WEIGHT else (of_optimizer, of_model)
        found = _holding(first, item.tensor) or (_holding(second, item.tensor) if item.kind != WEIGHT else None)
        if found:
            address, tensor, file, copy = found
            yield Copied(item, file, copy, (item.tensor.data_ptr() - address) // tensor.element_size())


def _holding(leaves: list[tuple[int, Tensor, str, Tensor]], wanted: Tensor) -> tuple[int, Tensor, str, Tensor] | None:
    begin, end = wanted.data_ptr(), wanted.data_ptr() + wanted.nbytes
    index = bisect_right(leaves, begin, key=lambda x: x[0]) - 1
    # Empty leaves may share an address with the one that is looked for; they are skipped.
    while index >= 0:
        address, tensor, _, _ = leaves[index]
        if address + tensor.nbytes >= end and tensor.dtype == wanted.dtype and tensor.is_contiguous():
            return leaves[index]
        if address < begin and tensor.nbytes:
            return None
        index -= 1
    return None


def _map(tree: Any, copy: Any) -> Any:
    if isinstance(tree, Tensor):
        return copy(tree)
    if isinstance(tree, dict):
        return type(tree)((key, _map(value, copy)) for key, value in tree.items())
    if type(tree) in (list, tuple):
        return type(tree)(_map(value, copy) for value in tree)
    return tree


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of a tree of dicts, lists and tuples in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif type(tree) in (list, tuple):
        for value in tree:
            yield from tensors_in(value)
