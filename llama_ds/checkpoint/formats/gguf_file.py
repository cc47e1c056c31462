"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): the header, and reading a file back.

The header is written by the package gguf, the tensors by the conversion, in chunks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, Keys
from torch import Tensor

from llama_ds.checkpoint.formats.gguf_blocks import Blocks, BlocksInFile
from llama_ds.checkpoint.formats.plan import OutputFile
from llama_ds.checkpoint.spread import in_one_file
from llama_ds.checkpoint.stored import Stored
from llama_ds.checkpoint.weights import Readable
from llama_ds.errors import UserError

ARCHITECTURE = "llama"
ALIGNMENT = 32  # bytes; the default of the format
NUMBERS = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


@dataclass(frozen=True)
class Entry:
    """The value of a metadata key. An array (a list) takes the type of its items."""

    value: Any
    type: GGUFValueType

    def equals(self, found: object) -> bool:
        """Return whether a value that was read back is this one."""
        if self.type is GGUFValueType.FLOAT32:
            return found == np.float32(self.value).item()
        if self.type is GGUFValueType.ARRAY and isinstance(self.value[0], float):
            return isinstance(found, list) and found == np.array(self.value, np.float32).tolist()
        return found == self.value


@dataclass(frozen=True)
class GgufFile(OutputFile):
    """A GGUF file to be written."""

    metadata: Mapping[str, Entry] = field(default_factory=dict)

    def surroundings(self) -> str:
        """Return all that the file holds beside its tensors."""
        return repr(self.metadata)

    def create(self, folder: str, dtype: torch.dtype) -> dict[str, Stored]:
        """Write the file without tensor data, and return the location of every tensor.

        Raises:
            OSError: the system cannot write the file.
        """
        path = os.path.join(folder, self.name)
        writer = GGUFWriter(path, ARCHITECTURE)
        for key, entry in self.metadata.items():
            writer.add_key_value(key, entry.value, entry.type)
        for tensor in self.tensors:
            encoding = tensor.stored_as(dtype)
            kind = GGMLQuantizationType.Q8_0 if isinstance(encoding, Blocks) else NUMBERS[encoding.dtype]
            nbytes = encoding.nbytes(tensor.numel)
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        places, end = {}, _aligned(os.path.getsize(path))
        for tensor in self.tensors:
            places[tensor.name] = Stored(path, end, tensor.stored_as(dtype).dtype, tensor.shape)
            end = _aligned(end + tensor.stored_as(dtype).nbytes(tensor.numel))
        os.truncate(path, end)
        return places

    def read_back(self, folder: str) -> dict[str, Readable]:
        """Return the tensors of the written file by name, found by gguf's reader, which also reads the metadata.

        Raises:
            UserError: the file is no GGUF file, or its metadata or the shapes of its tensors are not those written.
        """
        path = os.path.join(folder, self.name)
        try:
            reader = GGUFReader(path)
            fields = {key: value.contents() for key, value in reader.fields.items() if not key.startswith("GGUF.")}
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise UserError(f"{path}: cannot be read back as GGUF ({error}); {_AGAIN}") from None
        wanted = {Keys.General.ARCHITECTURE: Entry(ARCHITECTURE, GGUFValueType.STRING), **self.metadata}
        for key in {**wanted, **fields}:
            if key not in wanted or key not in fields or not wanted[key].equals(fields[key]):
                raise UserError(f"{path}: metadata {key} does not read back as it was written; {_AGAIN}")
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        found = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
        if shapes != found:
            different = sorted({name for name, _ in shapes.items() ^ found.items()})
            raise UserError(f"{path}: tensor {different[0]} does not read back as it was written; {_AGAIN}")
        return {t.name: _readable(path, t.tensor_type, t.data_offset, found[t.name]) for t in reader.tensors}


class InMemory:
    """A small tensor that is computed rather than stored."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self.shape, self.dtype = tensor.contiguous(), tuple(tensor.shape), tensor.dtype
        self.paths: set[str] = set()

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor in `dtype`, or as it is."""
        return self._tensor.to(dtype or self.dtype)

    def read(self, out: Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        """Fill `out` with elements from `start` on; the tensor has one part."""
        out.view(-1).copy_(self._tensor.view(-1)[start : start + out.numel()])


def _readable(path: str, kind: GGMLQuantizationType, offset: int, shape: tuple[int, ...]) -> Readable:
    if kind == GGMLQuantizationType.Q8_0:
        return BlocksInFile(path, int(offset), shape)
    dtype = next(dtype for dtype, number in NUMBERS.items() if number == kind)
    return in_one_file(Stored(path, int(offset), dtype, shape), 0 if len(shape) > 1 else None)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


_AGAIN = "the disk changed during the conversion: remove the folder and convert again"
