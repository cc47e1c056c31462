"""Documents of Megatron-LM's indexed datasets, which hold ids: NAME.idx describes the documents in NAME.bin.

    NAME.idx    MMIDIDX\\0\\0, version 1 (u64), code of the ids' type (u8), sequences (u64), entries of documents (u64),
                length of each sequence (i32), its offset in NAME.bin in bytes (i64), first sequence of each document
                and the number of sequences (i64)

All numbers are little-endian. preprocess_data.py ends each document with the tokenizer's end of text (--append-eod).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llama_ds.data.text.decompress import damaged
from llama_ds.data.text.formats import MEGATRON, megatron_index
from llama_ds.data.text.input_storage import is_remote
from llama_ds.errors import UserError

_MAGIC = b"MMIDIDX\0\0"
_HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("code", "u1"), ("sequences", "<u8"), ("entries", "<u8")])
_TYPES = {1: "u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # code of the type; 2, 6 and 7 (i1 and floats) hold no ids


@dataclass(frozen=True)
class MegatronFile:
    """An opened dataset. Document d is the ids starts[d] .. starts[d + 1] - 1."""

    path: str
    ids: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def documents(self, first: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the ids of documents `first` to `stop` - 1."""
        for start, end in zip(self.starts[first:stop], self.starts[first + 1 : stop + 1], strict=True):
            yield self.ids[start:end]


def open_megatron(path: str) -> MegatronFile:
    """Open NAME.bin with the NAME.idx beside it.

    Raises:
        UserError: the index is missing, damaged, or does not describe the file.
    """
    index = megatron_index(path)
    if is_remote(path):
        raise UserError(f"{path}: Megatron ids are read from a disk only; download {path} and {index} first")
    try:
        header = np.fromfile(index, _HEADER, 1)
        if not len(header) or header["magic"][0] != _MAGIC.rstrip(b"\0") or header["version"][0] != 1:
            raise damaged(index, MEGATRON, "it does not begin as an index of version 1")
        code, sequences, entries = (int(header[name][0]) for name in ("code", "sequences", "entries"))
        size, wanted = os.path.getsize(index), _HEADER.itemsize + 12 * sequences + 8 * entries
        if not wanted <= size <= wanted + sequences:  # a mode for each sequence may follow
            raise damaged(index, MEGATRON, f"{size} bytes, not the {wanted} of {sequences} sequences")
        lengths = np.fromfile(index, "<i4", sequences, offset=_HEADER.itemsize)
        offsets = np.fromfile(index, "<i8", sequences, offset=_HEADER.itemsize + 4 * sequences)
        documents = np.fromfile(index, "<i8", entries, offset=_HEADER.itemsize + 12 * sequences)
        found = os.path.getsize(path)
    except OSError as error:
        raise UserError(f"{index}: cannot be read ({error.strerror}); copy it beside {path}") from None
    if code not in _TYPES:
        raise UserError(f"{index}: its values have type {code}, which is no type of ids; only token ids are read")
    dtype = np.dtype(_TYPES[code])
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if (lengths < 0).any() or not np.array_equal(offsets, starts[:-1] * dtype.itemsize):
        raise damaged(index, MEGATRON, "its sequences do not follow each other")
    if not len(documents) or documents[0] or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise damaged(index, MEGATRON, "its documents do not cover its sequences")
    if found != starts[-1] * dtype.itemsize:
        raise damaged(path, MEGATRON, f"{found} bytes, not the {starts[-1] * dtype.itemsize} of its index")
    ids = np.memmap(path, dtype, "r") if found else np.empty(0, dtype)
    return MegatronFile(path, ids, starts[documents])
