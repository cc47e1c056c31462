"""Folders of torch.distributed.checkpoint (DCP): where the blocks of each tensor are stored.

    .metadata         a pickle of dataclasses: of each tensor the blocks that ranks have saved, and where each is
    __0_0.distcp      files of torch.save, one after the other, each with one block

The pickle is read with stand-ins for all classes, so that nothing in it is executed. Sources: metadata.py and
filesystem.py in torch/distributed/checkpoint.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from llama_ds.checkpoint.formats.inventory import check_file
from llama_ds.checkpoint.formats.views import RowBlocks
from llama_ds.checkpoint.spread import Run, Spread
from llama_ds.checkpoint.stored import StandIn, Stored, embedded_tensor
from llama_ds.checkpoint.weights import Readable
from llama_ds.errors import UserError

METADATA = ".metadata"
OTHER_FORMAT = ("common.pt", "metadata.json")  # files beside .metadata in Megatron-LM's torch_dist
STEP = re.compile(r"step-(\d{1,12})")


@dataclass(frozen=True)
class Block:
    """A rectangular part of a tensor."""

    begin: tuple[int, ...]
    stored: Stored


@dataclass(frozen=True)
class DcpTensor:
    """A tensor that DCP has saved, and where the file of each of its blocks is."""

    folder: str
    name: str
    shape: tuple[int, ...]
    places: tuple[tuple[tuple[int, ...], tuple[int, ...], str, int, int], ...]  # begin, sizes, file, offset, length
    stacked: bool = False  # True: blocks are stored with another dimension, of size 1, before those of `shape`

    def layer(self, index: int) -> DcpTensor:
        """Return one of the tensors that this one has along its first dimension.

        Raises:
            UserError: a block holds several of them.
        """
        own = [place for place in self.places if place[0][0] <= index < place[0][0] + place[1][0]]
        if any(sizes[0] != 1 for _, sizes, *_ in own):
            raise UserError(
                f"{self.folder}: a block of {self.name} holds several layers, which this reader does not know"
            )
        places = tuple((begin[1:], sizes[1:], file, at, length) for begin, sizes, file, at, length in own)
        return replace(self, name=f"{self.name}[{index}]", shape=self.shape[1:], places=places, stacked=True)

    def followed_by(self, other: DcpTensor) -> DcpTensor:
        """Return both as one tensor, with the rows of `other` at the end."""
        rows = self.shape[0]
        moved = [((begin[0] + rows, *begin[1:]), *place[1:]) for place in other.places for begin in place[:1]]
        return replace(self, shape=(rows + other.shape[0], *self.shape[1:]), places=(*self.places, *moved))

    def readable(self, dim: int | None) -> Readable:
        """Return the tensor, to be sharded along `dim`.

        Raises:
            UserError: a block is damaged, or they do not cover the tensor.
        """
        blocks = []
        for begin, sizes, name, offset, length in self.places:
            stored = embedded_tensor(check_file(os.path.join(self.folder, name)), offset, length)
            if self.stacked and stored.shape[:1] == (1,):
                stored = replace(stored, shape=stored.shape[1:])
            if stored.shape != sizes:
                raise UserError(
                    f"{stored.path}: the block of {self.name} at {list(begin)} has shape {list(stored.shape)}, "
                    f"{METADATA} implies {list(sizes)}; copy the checkpoint again"
                )
            blocks.append(Block(begin, stored))
        self._check_cover(blocks)
        blocks.sort(key=lambda block: block.begin)
        if any(block.stored.shape[1:] != self.shape[1:] for block in blocks):
            return Tiles(self.shape, dim, blocks)
        width = torch.Size(self.shape[1:]).numel()
        runs = [Run(b.begin[0] * width, b.stored, torch.Size(b.stored.shape).numel()) for b in blocks]
        return Spread(self.shape, dim, [runs])

    def _check_cover(self, blocks: Sequence[Block]) -> None:
        covered = sum(torch.Size(block.stored.shape).numel() for block in blocks)
        if covered != torch.Size(self.shape).numel() or any(_overlap(*pair) for pair in combinations(blocks, 2)):
            raise UserError(
                f"{os.path.join(self.folder, METADATA)}: the blocks of {self.name} do not cover its shape "
                f"{list(self.shape)} once; copy the checkpoint again"
            )
        if len({block.stored.dtype for block in blocks}) > 1:
            raise UserError(f"{self.folder}: the blocks of {self.name} have several dtypes; save the checkpoint again")


class Tiles(RowBlocks):
    """A matrix stored in rectangular blocks, sharded along `dim`."""

    def __init__(self, shape: tuple[int, ...], dim: int | None, blocks: Sequence[Block]) -> None:
        self.shape, self._dim, self._blocks = shape, dim, list(blocks)

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        return self._blocks[0].stored.dtype

    @property
    def paths(self) -> set[str]:
        """The files that hold it."""
        return {block.stored.path for block in self._blocks}

    def _width(self, size: int) -> int:
        return self.shape[1] // size if self._dim == 1 else self.shape[1]

    def _block(self, rank: int, size: int, row: int, buffer: Tensor) -> Tensor:
        first = row + (rank * (self.shape[0] // size) if self._dim == 0 else 0)
        for block in self._blocks:
            (top, left), (rows, columns) = block.begin, block.stored.shape
            begin, end = max(first, top), min(first + len(buffer), top + rows)
            if begin < end:
                part = torch.empty(end - begin, columns, dtype=buffer.dtype)
                block.stored.read(part, (begin - top) * columns)
                buffer[begin - first : end - first, left : left + columns] = part
        width = self._width(size)
        return buffer[:, rank * width : (rank + 1) * width] if self._dim == 1 else buffer


def holds_dcp(folder: str) -> bool:
    """Return whether a folder is a checkpoint of DCP, or has some named step-N; but not Megatron-LM's torch_dist."""
    names = os.listdir(folder)
    if METADATA in names:
        return not any(name in names for name in OTHER_FORMAT)
    return any(STEP.fullmatch(name) and os.path.lexists(os.path.join(folder, name, METADATA)) for name in names)


def dcp_tensors(folder: str) -> dict[str, DcpTensor]:
    """Return the tensors of a checkpoint by name.

    Raises:
        UserError: its metadata is missing or damaged, or of a form that is not known.
    """
    return dcp_entries(folder)[0]


def dcp_entries(folder: str) -> tuple[dict[str, DcpTensor], dict[str, tuple[str, int, int]]]:
    """Return the tensors of a checkpoint by name, and of its other objects the path, offset and length in bytes.

    Raises:
        UserError: its metadata is missing or damaged, or of a form that is not known.
    """
    path = check_file(os.path.join(folder, METADATA))
    try:
        with open(path, "rb") as file:
            metadata = _Reader(io.BytesIO(file.read())).load()
        places = _places(metadata.storage_data.items())
        objects = {
            name: (os.path.join(folder, file), offset, length)
            for (name, begin), (file, offset, length) in places.items()
            if not begin
        }
        tensors = {
            str(name): DcpTensor(folder, str(name), entry.size, tuple(_blocks(str(name), entry, places)))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, _TensorStorageMetadata)
        }
        return tensors, {name: where for name, where in objects.items() if name not in tensors}
    except Exception as error:  # a damaged pickle can raise any exception
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be read as metadata of torch's DCP ({reason}); copy it again") from None


def _places(entries: Iterable[tuple[Any, Any]]) -> dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
    """Return file, offset and length in bytes of each block, by the name of its tensor and its begin."""
    found = {}
    for index, info in entries:
        name, offset, length = str(info.relative_path), int(info.offset), int(info.length)
        if os.path.basename(name) != name or name in ("", ".", "..") or offset < 0 or length < 0:
            raise ValueError(f"{name!r} is no file of the folder")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{name} is compressed or encrypted")
        found[str(index.fqn), tuple(getattr(index, "offset", None) or ())] = name, offset, length
    return found


def _blocks(name: str, entry: Any, places: dict[Any, tuple[str, int, int]]) -> Iterable[tuple[Any, ...]]:
    for chunk in entry.chunks:
        begin = tuple(chunk.offsets)
        yield begin, tuple(chunk.sizes), *places[name, begin]


def _overlap(first: Block, second: Block) -> bool:
    sides = zip(first.begin, first.stored.shape, second.begin, second.stored.shape, strict=True)
    return all(begin < other + more and other < begin + length for begin, length, other, more in sides)


class _Fields:
    """Stands in for a dataclass: has what the pickle says of its fields."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            vars(self).update({str(key): value for key, value in state.items()})


class _TensorStorageMetadata(_Fields):
    """Says how a tensor was saved."""

    size: tuple[int, ...]


def _size(values: Iterable[int] = ()) -> tuple[int, ...]:
    """Stands in for torch.Size."""
    found = tuple(values)
    if not all(type(value) is int and value >= 0 for value in found):
        raise ValueError(f"{found} is no shape")
    return found


class _Reader(pickle.Unpickler):
    """Unpickles metadata. Its classes are those above, whatever the pickle asks for."""

    KNOWN = {  # noqa: RUF012  (the base class is not generic)
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"): _TensorStorageMetadata,
        ("torch", "Size"): _size,
        ("collections", "OrderedDict"): OrderedDict,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a class or function."""
        known = self.KNOWN.get((module, name))
        if known is not None:
            return known
        return _Fields if module.startswith("torch.distributed.checkpoint.") else StandIn
