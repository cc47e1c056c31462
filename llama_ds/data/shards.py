"""Reading packed rows: a source's manifest and its webdataset tar shards, mapped into memory.

A source is a folder: manifest.json, train-00000.tar ..., validation-00000.tar ... Each tar member is one row, the raw
little-endian ids of seq_len + 1 tokens. All members have one size, so row i of a shard stands at a fixed offset,
i * stride + 512, and is read without unpacking: webdataset and tarfile read the same files (`build.py`, `verify.py`).
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from llama_ds.data.tokenizer import Tokenizer
from llama_ds.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
TAR_BLOCK = 512  # bytes; a tar member is one header block and its content padded to blocks
OPEN_SHARDS = 16  # maps kept open per source: each holds a file descriptor
REBUILD = "rebuild the source with tools/shards.py build --overwrite"


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The training or the validation rows of a source."""

    rows: int
    tokens: int  # labels: rows * seq_len
    documents: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """What a source holds and how it was made."""

    source: str
    seq_len: int
    vocab_size: int
    dtype: str
    tokenizer_sha256: str
    splits: dict[str, Split]
    format: int = FORMAT


def member_name(row: int, dtype: np.dtype) -> tuple[str, str]:
    """Return webdataset's key and extension of row `row` of a split."""
    return f"{row:08d}", f"ids.u{dtype.itemsize * 8}"


def member_stride(seq_len: int, dtype: np.dtype) -> int:
    """Return the bytes from one tar member to the next."""
    return TAR_BLOCK + -(-(seq_len + 1) * dtype.itemsize // TAR_BLOCK) * TAR_BLOCK


def read_manifest(folder: str) -> Manifest:
    """Read the manifest of the source in `folder`.

    Raises:
        UserError: it is missing (also after a build that did not finish), damaged or of another format.
    """
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            raw = json.load(file)
        if raw["format"] != FORMAT:
            raise UserError(f"{path}: format {raw['format']}, this program reads {FORMAT}; {REBUILD}")
        splits = {
            name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
            for name, split in raw["splits"].items()
        }
        return Manifest(**{**raw, "splits": splits})
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the shards' manifest ({error.strerror}); build the source with tools/shards.py build"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest of shards ({type(error).__name__}: {error}); {REBUILD}") from None


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Write the manifest in one step: a folder with a manifest is a source that was built to its end."""
    path = os.path.join(folder, MANIFEST)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def check_tokenizer(manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Raise UserError unless the source was built with this very tokenizer."""
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"source {manifest.source}: its shards were built with tokenizer {manifest.tokenizer_sha256[:12]} "
            f"(vocab {manifest.vocab_size}), but {tokenizer.path} is {tokenizer.sha256[:12]} "
            f"(vocab {tokenizer.vocab_size}); name the tokenizer of the shards, or {REBUILD}"
        )


class Source:
    """The rows of one split of one source.

    Opening checks that every shard exists at its full size; the headers of a shard are checked when it is first read.
    """

    def __init__(self, folder: str, manifest: Manifest, split: str) -> None:
        self.folder, self.name, self.split = folder, manifest.source, split
        self.seq_len, self.vocab_size = manifest.seq_len, manifest.vocab_size
        self.tokenizer_sha256 = manifest.tokenizer_sha256
        self.rows = manifest.splits[split].rows
        self.shard_rows = [shard.rows for shard in manifest.splits[split].shards]
        self._shards = manifest.splits[split].shards
        self._dtype = np.dtype(manifest.dtype)
        self._first = [0, *accumulate(self.shard_rows)]
        self._map = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)
        for shard in self._shards:
            self._check_size(shard)

    def row(self, i: int) -> np.ndarray:
        """Return row `i`, (seq_len + 1,), as a read-only view of the file."""
        if not 0 <= i < self.rows:
            raise IndexError(f"row {i} of {self.rows} in {self.folder} ({self.split})")
        shard = bisect.bisect_right(self._first, i) - 1
        return self._map(shard)[i - self._first[shard]]

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all rows in order, a shard (rows, seq_len + 1) at a time, as read-only views."""
        return (self._map(shard) for shard in range(len(self._shards)))

    def _check_size(self, shard: Shard) -> None:
        path = os.path.join(self.folder, shard.name)
        try:
            size = os.path.getsize(path)
        except OSError as error:
            raise UserError(f"{path}: cannot open the shard ({error.strerror}); copy it again or {REBUILD}") from None
        if size != shard.bytes:
            raise UserError(
                f"{path}: shard is {size} bytes, its manifest says {shard.bytes}; "
                f"it was {'cut short' if size < shard.bytes else 'changed'}, copy it again or {REBUILD}"
            )

    def _open_shard(self, index: int) -> np.ndarray:
        shard, stride = self._shards[index], member_stride(self.seq_len, self._dtype)
        self._check_size(shard)  # again: the map must not reach beyond the file
        data = np.memmap(os.path.join(self.folder, shard.name), np.uint8, "r", shape=(shard.rows, stride))
        for row in {0, shard.rows - 1}:
            self._check_header(bytes(data[row, :TAR_BLOCK]), shard, self._first[index] + row)
        content = data[:, TAR_BLOCK : TAR_BLOCK + (self.seq_len + 1) * self._dtype.itemsize]
        return content.view(self._dtype)

    def _check_header(self, header: bytes, shard: Shard, row: int) -> None:
        name = ".".join(member_name(row, self._dtype))
        size = f"{(self.seq_len + 1) * self._dtype.itemsize:011o}"
        found = header[:100].rstrip(b"\0"), header[124:135], header[257:262]  # POSIX ustar: name, size, magic
        if found != (name.encode(), size.encode(), b"ustar"):
            raise UserError(
                f"{os.path.join(self.folder, shard.name)}: no tar header of {name} where it should stand "
                f"(found {found[0][:24]!r}); the shard is damaged, copy it again or {REBUILD}"
            )


def open_source(folder: str, split: str) -> Source:
    """Open one split ("train" or "validation") of the source in `folder`.

    Raises:
        UserError: no manifest, no such split, or a shard that is missing, cut short or damaged.
    """
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        raise UserError(f"{folder}: no split '{split}'; it holds {', '.join(manifest.splits)}")
    return Source(folder, manifest, split)
