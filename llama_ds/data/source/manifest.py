"""The manifest of a source. Shard contents follow by arithmetic, so 100,000 shards open as fast as ten.

A source is a folder, or a URL with the same file names:

    manifest.json                     the manifest; written last, it marks the source as complete
    train-000000.tar ...              rows of ids as webdataset tars (`tar_rows.py`)
    validation-000000.tar ...
    index/train-0000.sha256 ...       checksums of 1024 shards each, readable by `sha256sum -c`
    index/train-000000.documents.gz   index of the documents of a shard (`documents_index.py`)
    index/input-0000.gz               list of the input files of a build or addition (`input_index.py`)

Each build, and each addition to a source, is an extent: its documents are concatenated and cut into rows, and the last
row is padded with eos. The manifest counts the ids, so it tells the padding from the documents. All shards of an extent
have `rows_per_shard` rows except the last, which has the remainder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

import numpy as np

from llama_ds.atomic_files import write_atomically
from llama_ds.config.reader import ConfigSource, read
from llama_ds.data.source import source_folder
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

FORMAT = 2
MANIFEST = source_folder.MANIFEST
SPLITS = ("train", "validation")
DTYPES = ("<u2", "<u4")
MANY = 1 << 60  # more ids than any source has; sums of them fit 64 bits
CHECKSUM_BLOCK = 1024  # shards in one file of checksums
REBUILD = "rebuild the source with tools/shards.py build --overwrite"


@dataclass(frozen=True)
class Extent:
    """The part of a split that one build wrote."""

    rows: int
    documents: int
    ids: int  # ids of its documents with bos and eos, without the padding of the last row
    sha256: str = ""  # `extent_digest` of its shards; "" in manifests of older versions


@dataclass(frozen=True)
class Split:
    """The training or validation rows of a source. Rows and shards are numbered consecutively over all extents."""

    rows_per_shard: int
    extents: tuple[Extent, ...]
    bad: tuple[int, ...] = ()  # damaged shards according to `tools/shards.py verify --repair`; runs read others instead

    @property
    def rows(self) -> int:
        """Total number of rows."""
        return sum(extent.rows for extent in self.extents)

    @property
    def documents(self) -> int:
        """Total number of documents."""
        return sum(extent.documents for extent in self.extents)

    @property
    def ids(self) -> int:
        """Total number of ids, without padding."""
        return sum(extent.ids for extent in self.extents)

    def labels(self, rows: np.ndarray, seq_len: int) -> np.ndarray:
        """Return how many labels of each row, out of `seq_len`, are ids of documents; the others are filler."""
        extent, row = self._in_extent(rows)
        ids = np.array([extent.ids for extent in self.extents], np.int64)
        return np.minimum(seq_len, ids[extent] - 1 - row * seq_len)

    def filler(self, seq_len: int) -> int:
        """Return how many labels of all rows are filler, which completes the last row of each extent."""
        return self.rows * seq_len - sum(max(0, extent.ids - 1) for extent in self.extents)

    @property
    def shards(self) -> int:
        """Total number of shards."""
        return sum(self.extent_shards)

    @property
    def extent_shards(self) -> list[int]:
        """Number of shards of each extent."""
        return [-(-extent.rows // self.rows_per_shard) for extent in self.extents]

    def shard_rows(self, shard: int) -> range:
        """Return the row numbers of a shard."""
        extent, first_shard, first_row = self._extent_of(shard)
        start = first_row + (shard - first_shard) * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, first_row + self.extents[extent].rows))

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard of each row, and its row number in that shard."""
        first_shards = np.array([0, *accumulate(self.extent_shards[:-1])], np.int64)
        extent, row = self._in_extent(rows)
        shard, shard_row = np.divmod(row, self.rows_per_shard)
        return shard + first_shards[extent], shard_row

    def _in_extent(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the extent of each row, and its row number in that extent."""
        first_rows = np.array([0, *accumulate(extent.rows for extent in self.extents[:-1])], np.int64)
        extent = np.searchsorted(first_rows, rows, side="right") - 1
        return extent, rows - first_rows[extent]

    def _extent_of(self, shard: int) -> tuple[int, int, int]:
        """Return a shard's extent, and that extent's first shard and row."""
        first_shard = first_row = 0
        for i, (extent, shards) in enumerate(zip(self.extents, self.extent_shards, strict=True)):
            if shard < first_shard + shards:
                return i, first_shard, first_row
            first_shard, first_row = first_shard + shards, first_row + extent.rows
        raise IndexError(f"shard {shard} of {first_shard}")


@dataclass(frozen=True)
class BuildInput:
    """The input of one build or addition."""

    appended: bool  # False: the build that created the source
    files: int
    bytes: int
    sha256: str  # checksum of the checksums of the files, in order
    settings: dict[str, object]  # flags that decide which documents the files give


@dataclass(frozen=True)
class Manifest:
    """Contents of a source and the settings of its build."""

    source: str
    seq_len: int
    vocab_size: int
    dtype: str  # "<u2" or "<u4", the dtype of ids
    tokenizer_sha256: str
    validation_fraction: float
    splits: dict[str, Split]
    format: int = FORMAT
    inputs: tuple[BuildInput, ...] = ()  # older versions recorded none


def rows_of(ids: int, seq_len: int) -> int:
    """Return the number of rows for `ids` ids, including a partly filled last row."""
    return -(-max(0, ids - 1) // seq_len)


def shard_name(split: str, shard: int) -> str:
    """Return the file name of a shard."""
    return f"{split}-{shard:06d}.tar"


def documents_name(split: str, shard: int) -> str:
    """Return the file name of the index of a shard's documents."""
    return f"index/{split}-{shard:06d}.documents.gz"


def checksums_name(split: str, shard: int) -> str:
    """Return the name of the checksum file of a shard."""
    return f"index/{split}-{shard // CHECKSUM_BLOCK:04d}.sha256"


def extent_digest(sha256: Sequence[str]) -> str:
    """Return the identity of the content of an extent whose shards have these checksums."""
    return hashlib.sha256("".join(sha256).encode()).hexdigest()


def checksum_line(split: str, shard: int, sha256: str) -> str:
    """Return the line of a shard in its checksum file: in the format of sha256sum, with a fixed length."""
    return f"{sha256}  {shard_name(split, shard)}\n"


def checksum_of(content: bytes, split: str, shard: int) -> str | None:
    """Return the checksum of a shard from the content of its checksum file, or None if it is missing there."""
    length = len(checksum_line(split, shard, "0" * 64))
    line = content[shard % CHECKSUM_BLOCK * length :][:length].decode("ascii", "replace")
    return line[:64] if line == checksum_line(split, shard, line[:64]) else None


def checksum_blocks(split: str, sha256: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, content) of the checksum files for all shards of a split."""
    for start in range(0, len(sha256), CHECKSUM_BLOCK):
        block = sha256[start : start + CHECKSUM_BLOCK]
        yield (
            checksums_name(split, start),
            "".join(checksum_line(split, start + i, digest) for i, digest in enumerate(block)),
        )


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Return the manifest with the given content.

    Raises:
        UserError: it is damaged or has another format; the message names `where`, the path or URL.
    """
    try:
        raw = json.loads(content)
        if raw["format"] != FORMAT:
            raise UserError(f"{where}: format {raw['format']}, this program reads {FORMAT}; {REBUILD}")
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise UserError(f"{where}: not a manifest of shards ({type(error).__name__}: {error}); {REBUILD}") from None
    try:
        manifest = read(Manifest, raw, ConfigSource(where))
        _check(manifest)
    except (UserError, ValueError) as error:
        reason = str(error).removeprefix(f"{where}: ")
        raise UserError(f"{where}: not a manifest of shards ({reason}); {REBUILD}") from None
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise ValueError for numbers that no build writes."""
    if set(manifest.splits) != set(SPLITS) or manifest.dtype not in DTYPES:
        raise ValueError(f"splits {list(manifest.splits)} of dtype {manifest.dtype}")
    if not (0 < manifest.seq_len < 1 << 31 and 0 < manifest.vocab_size < 1 << 31):
        raise ValueError(f"seq_len {manifest.seq_len}, vocab_size {manifest.vocab_size}")
    for name, split in manifest.splits.items():
        if not 0 < split.rows_per_shard < MANY:
            raise ValueError(f"splits.{name}.rows_per_shard = {split.rows_per_shard}")
        for extent in split.extents:
            if not (0 <= extent.documents < MANY and 0 <= extent.ids < MANY):
                raise ValueError(f"splits.{name} has {extent.documents} documents of {extent.ids} ids")
            if extent.rows != (rows := rows_of(extent.ids, manifest.seq_len)):  # the rows tell filler from labels
                raise ValueError(f"splits.{name}: {extent.ids} ids are {rows} rows, not {extent.rows}")
        if not all(0 <= shard < split.shards for shard in split.bad):
            raise ValueError(f"splits.{name}.bad = {list(split.bad)} of {split.shards} shards")


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Write the manifest atomically: a folder with a manifest is a complete source."""
    write_atomically(os.path.join(folder, MANIFEST), json.dumps(asdict(manifest), indent=1), durable=True)


def check_tokenizer(manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Raise UserError unless the source was built with the same tokenizer."""
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"source {manifest.source}: its shards were built with tokenizer {manifest.tokenizer_sha256[:12]} "
            f"(vocab {manifest.vocab_size}), but {tokenizer.path} is {tokenizer.sha256[:12]} "
            f"(vocab {tokenizer.vocab_size}); name the tokenizer of the shards, or {REBUILD}"
        )
