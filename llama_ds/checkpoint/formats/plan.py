"""What a conversion will write: files, the tensors in each, and the small files beside them. Nothing is read yet."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from math import gcd

import torch
from torch.serialization import skip_data

from llama_ds.checkpoint.manifest import Description
from llama_ds.checkpoint.stored import SAFETENSORS_DTYPES, Stored, safetensors_tensors, torch_tensors
from llama_ds.checkpoint.weights import ModelFiles, Readable
from llama_ds.config.numbers import divisors
from llama_ds.errors import UserError, listed

SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
ALIGNMENT = 8  # bytes: where the first tensor of a safetensors file begins


@dataclass(frozen=True)
class Target:
    """What a conversion is to make."""

    dtype: str  # of DTYPES
    tp: int = 1  # tensor-parallel parts
    pp: int = 1  # pipeline stages that DeepSpeed's own loader is to expect


@dataclass(frozen=True)
class Placed:
    """A tensor, or a tensor-parallel rank's part of one, in a file to be written."""

    name: str
    shape: tuple[int, ...]
    source: Readable
    rank: int = 0
    size: int = 1

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class OutputFile:
    """A file of tensors: safetensors or, by its name, what torch.save writes of a state dict."""

    name: str
    tensors: tuple[Placed, ...]

    def nbytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of its tensors."""
        return sum(tensor.numel for tensor in self.tensors) * dtype.itemsize

    def create(self, folder: str, dtype: torch.dtype) -> dict[str, Stored]:
        """Write the file without its tensors' bytes, and return where they belong.

        Raises:
            OSError, RuntimeError: as the system, or torch, says.
        """
        path = os.path.join(folder, self.name)
        if not self.name.endswith(".safetensors"):
            with skip_data():  # the memory of torch.empty is not touched either
                torch.save({t.name: torch.empty(t.shape, dtype=dtype) for t in self.tensors}, path)
        else:
            header = safetensors_header(self.tensors, dtype)
            with open(path, "wb") as file:
                file.write(header)
                file.truncate(len(header) + self.nbytes(dtype))
        return self.places(folder)

    def places(self, folder: str) -> dict[str, Stored]:
        """Return where in the file its tensors are."""
        find = safetensors_tensors if self.name.endswith(".safetensors") else torch_tensors
        return find(os.path.join(folder, self.name))


@dataclass(frozen=True)
class Plan:
    """All that a conversion writes."""

    kind: str  # of the result
    dtype: torch.dtype
    files: tuple[OutputFile, ...]
    small: Mapping[str, bytes]  # by name
    copied: Mapping[str, str] = field(default_factory=dict)  # paths by name
    description: Description | None = None  # of a checkpoint of ours: its index and manifest are written at the end

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(file.nbytes(self.dtype) for file in self.files)


def safetensors_header(tensors: tuple[Placed, ...], dtype: torch.dtype) -> bytes:
    """Return what a safetensors file begins with: 8 bytes of length, little-endian, and JSON padded with spaces."""
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
    """Return the shape of a rank's part of a tensor that `size` ranks cut along `dim`."""
    return shape if dim is None else tuple(n // size if i == dim else n for i, n in enumerate(shape))


def check_parts(files: ModelFiles, target: Target) -> None:
    """Check that the model can be cut as the target says.

    Raises:
        UserError: naming the size that cannot, and the numbers that would do.
    """
    model = files.model
    keys = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    sizes = {key: getattr(model, key) for key in keys}
    for key, size in sizes.items():
        if target.tp < 1 or size % target.tp:
            fits = listed(divisors(reduce(gcd, sizes.values())))
            raise UserError(
                f"command line: --tp {target.tp} does not divide {key} = {size} of {files.path}; use {fits}"
            )
    if not 1 <= target.pp <= model.num_hidden_layers:
        raise UserError(
            f"command line: --pp {target.pp} is not in 1..{model.num_hidden_layers}, the decoder layers of {files.path}"
        )


def as_json(content: object) -> bytes:
    """Return a small file's content."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
