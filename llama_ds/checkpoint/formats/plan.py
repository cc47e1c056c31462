"""The plan of a conversion: output files, the tensors in each, and small files. Making it reads no tensor data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from math import gcd
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.serialization import skip_data

from llama_ds.checkpoint.manifest import Description
from llama_ds.checkpoint.stored import (
    SAFETENSORS_DTYPES,
    Stored,
    embedded_tensor,
    flat,
    located,
    safetensors_tensors,
    torch_content,
    torch_tensors,
)
from llama_ds.checkpoint.weights import ModelFiles, Readable
from llama_ds.config.numbers import divisors
from llama_ds.errors import UserError, listed
from llama_ds.layout.vocab_parts import part_rows

SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
DCP_SUFFIX = ".distcp"
ALIGNMENT = 8  # bytes; alignment of the first tensor in a safetensors file


@dataclass(frozen=True)
class Target:
    """The dtype and layout of a conversion's result."""

    dtype: str  # key of DTYPES
    tp: int = 1  # tensor-parallel parts
    pp: int = 1  # pipeline stages: of the files, or that the loader expects; 0: no pipeline (neox, megatron_deepspeed)
    embedding: str | None = None  # for meta: "rows" or "columns", how the embedding is sharded; None: as it follows
    transformer_impl: str = "transformer_engine"  # one of choices.TRANSFORMER_IMPLS, for megatron
    qkv_order: str | None = None  # for megatron_deepspeed, one of choices.QKV_ORDERS; None: that of its present code


class Encoding(Protocol):
    """Interface of the ways in which a file stores the elements of a tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the elements before they are encoded."""

    def nbytes(self, numel: int) -> int:
        """Return the size of so many elements in bytes."""

    def encode(self, part: Tensor) -> Tensor:
        """Return the elements as they are stored."""


@dataclass(frozen=True)
class Numbers:
    """Elements as numbers of one dtype."""

    dtype: torch.dtype

    def nbytes(self, numel: int) -> int:
        """Return the size of so many elements in bytes."""
        return numel * self.dtype.itemsize

    def encode(self, part: Tensor) -> Tensor:
        """Return the elements, which have that dtype."""
        return part


@dataclass(frozen=True)
class OutputTensor:
    """A tensor in a file to be written: shard `rank` of `size` of `source`."""

    name: str
    shape: tuple[int, ...]
    source: Readable
    rank: int = 0
    size: int = 1
    encoding: Encoding | None = None  # None: numbers of the plan's dtype

    def stored_as(self, dtype: torch.dtype) -> Encoding:
        """Return how the file stores the elements, in a plan of `dtype`."""
        return self.encoding or Numbers(dtype)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Enclosing:
    """What surrounds the state dict in a file written by torch.save."""

    key: str  # key of the state dict in the dict that is written
    beside: Mapping[str, object]  # the other entries of that dict
    empty: tuple[str, ...] = ()  # entries of the state dict that are None
    modules: tuple[str, ...] = ()  # modules whose tensors are in dicts of their own, nested by the parts of their names

    def around(self, tensors: Mapping[str, Tensor]) -> dict[str, object]:
        """Return what to write."""
        state: dict[str, Any] = {}
        for name, tensor in tensors.items():
            module = next((module for module in self.modules if name.startswith(f"{module}.")), "")
            inner = state
            for part in module.split(".") if module else ():
                inner = inner.setdefault(part, {})
            inner[name.removeprefix(f"{module}.") if module else name] = tensor
        return {**self.beside, self.key: {**state, **dict.fromkeys(self.empty)}}


@dataclass(frozen=True)
class OutputFile:
    """A file of tensors. Its name decides the format: safetensors, or what torch.save writes.

    That is a state dict, or the only tensor itself in a file of DCP (`.distcp`).
    """

    name: str
    tensors: tuple[OutputTensor, ...]
    enclosing: Enclosing | None = None  # None: the state dict is all that the file holds

    def nbytes(self, dtype: torch.dtype) -> int:
        """Return the size of the tensors in bytes."""
        return sum(tensor.stored_as(dtype).nbytes(tensor.numel) for tensor in self.tensors)

    def surroundings(self) -> str:
        """Return all that the file holds beside its tensors, to recognise the same file in another conversion."""
        return repr(self.enclosing)

    def create(self, folder: str, dtype: torch.dtype) -> dict[str, Stored]:
        """Write the file without tensor data, and return the location of every tensor.

        Raises:
            OSError, RuntimeError: the system, or torch, cannot write the file.
        """
        path = os.path.join(folder, self.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not self.name.endswith(".safetensors"):
            tensors = {t.name: torch.empty(t.shape, dtype=dtype) for t in self.tensors}
            with skip_data():  # the pages of torch.empty are not touched, so they take no memory
                torch.save(self._saved(tensors), path)
        else:
            header = safetensors_header(self.tensors, dtype)
            with open(path, "wb") as file:
                file.write(header)
                file.truncate(len(header) + self.nbytes(dtype))
        return self.locate(folder)

    def _saved(self, tensors: Mapping[str, Tensor]) -> object:
        """Return what torch.save writes."""
        if self.name.endswith(DCP_SUFFIX):
            (tensor,) = tensors.values()
            return tensor
        return self.enclosing.around(tensors) if self.enclosing else dict(tensors)

    def locate(self, folder: str) -> dict[str, Stored]:
        """Return the location of every tensor in the written file."""
        path = os.path.join(folder, self.name)
        if self.name.endswith(DCP_SUFFIX):
            return {self.tensors[0].name: embedded_tensor(path, 0, os.path.getsize(path))}
        if self.enclosing:
            state = flat(torch_content(path, inert=True)[self.enclosing.key])
            return located(path, {tensor.name: state[tensor.name] for tensor in self.tensors})
        return safetensors_tensors(path) if self.name.endswith(".safetensors") else torch_tensors(path)


@dataclass(frozen=True)
class Plan:
    """All files that a conversion writes."""

    kind: str  # the result's format
    dtype: torch.dtype
    files: tuple[OutputFile, ...]
    small: Mapping[str, bytes]  # contents of small files by name
    copied: Mapping[str, str] = field(default_factory=dict)  # paths of files to copy by name
    description: Description | None = None  # only for a checkpoint of this project, whose manifest is written last
    dropped: tuple[str, ...] = ()  # what of the source the format has no place for
    single: bool = False  # the result is the one file itself, not a folder
    notes: tuple[str, ...] = ()  # what the user of the result has to know
    finish: Callable[[str], None] | None = None  # is given the folder once its files are written, to describe them

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(file.nbytes(self.dtype) for file in self.files)


def safetensors_header(tensors: tuple[OutputTensor, ...], dtype: torch.dtype) -> bytes:
    """Return the header of a safetensors file: its length in 8 little-endian bytes, and JSON padded with spaces."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.numel * dtype.itemsize
        entries[tensor.name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def part_shape(shape: tuple[int, ...], dim: int | None, size: int) -> tuple[int, ...]:
    """Return the shape of one rank's part of a tensor that is sharded over `size` ranks along `dim`, with padding."""
    return tuple(part_rows(n, size) if i == dim else n for i, n in enumerate(shape))


def check_parts(files: ModelFiles, target: Target, padded: bool = False, fewest_stages: int = 1) -> None:
    """Check that the model can be sharded as the target says.

    Args:
        padded: the vocabulary is padded to fit.
        fewest_stages: 0 if the format has files without a pipeline.

    Raises:
        UserError: it cannot; the message names the indivisible size and the numbers that are possible.
    """
    model = files.model
    keys = ["num_attention_heads", "num_key_value_heads", "intermediate_size", *([] if padded else ["vocab_size"])]
    sizes = {key: getattr(model, key) for key in keys}
    for key, size in sizes.items():
        if target.tp < 1 or size % target.tp:
            fits = listed(divisors(reduce(gcd, sizes.values())))
            raise UserError(
                f"command line: --tp {target.tp} does not divide {key} = {size} of {files.path}; use {fits}"
            )
    if not fewest_stages <= target.pp <= model.num_hidden_layers:
        raise UserError(
            f"command line: --pp {target.pp} is not in {fewest_stages}..{model.num_hidden_layers}, the decoder layers "
            f"of {files.path}"
        )


def as_json(content: object) -> bytes:
    """Return the content of a JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
