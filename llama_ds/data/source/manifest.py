"""A source's manifest: what its shards hold, by arithmetic: a source of 100,000 shards opens as fast as one of ten.

A source is a folder, or a URL with the same names below it:

    manifest.json                     this file; written last: with it the source is complete
    train-000000.tar ...              rows of ids (`tar_rows.py`), webdataset tars
    validation-000000.tar ...
    index/train-0000.sha256 ...       checksums of 1024 shards each, for `sha256sum -c` too
    index/train-000000.documents.gz   which documents stand where in a shard (`documents_index.py`)

Each build, or addition to one, is an extent: its documents laid end to end and cut into rows, the last row filled up
with eos. All shards of an extent have `rows_per_shard` rows but the last, which has what is left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate

import numpy as np

from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

FORMAT = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
CHECKSUM_BLOCK = 1024  # shards in one file of checksums
REBUILD = "rebuild the source with tools/shards.py build --overwrite"


@dataclass(frozen=True)
class Extent:
    """What one build wrote to a split."""

    rows: int
    documents: int
    ids: int  # bos, text and eos of its documents, without the filling of the last row


@dataclass(frozen=True)
class Split:
    """The training or the validation rows of a source. Rows and shards are numbered through all extents."""

    rows_per_shard: int
    extents: tuple[Extent, ...]
    bad: tuple[int, ...] = ()  # shards that `tools/shards.py verify --repair` found damaged: runs read others instead

    @property
    def rows(self) -> int:
        """All rows."""
        return sum(extent.rows for extent in self.extents)

    @property
    def documents(self) -> int:
        """All documents."""
        return sum(extent.documents for extent in self.extents)

    @property
    def ids(self) -> int:
        """All ids of documents."""
        return sum(extent.ids for extent in self.extents)

    @property
    def shards(self) -> int:
        """All shards."""
        return sum(self.extent_shards)

    @property
    def extent_shards(self) -> list[int]:
        """Shards of each extent."""
        return [-(-extent.rows // self.rows_per_shard) for extent in self.extents]

    def shard_rows(self, shard: int) -> range:
        """Return the rows that stand in a shard."""
        extent, first_shard, first_row = self._extent_of(shard)
        start = first_row + (shard - first_shard) * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, first_row + self.extents[extent].rows))

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard of each row, and its place in that shard."""
        first_rows = np.array([0, *accumulate(extent.rows for extent in self.extents[:-1])], np.int64)
        first_shards = np.array([0, *accumulate(self.extent_shards[:-1])], np.int64)
        extent = np.searchsorted(first_rows, rows, side="right") - 1
        shard, inside = np.divmod(rows - first_rows[extent], self.rows_per_shard)
        return shard + first_shards[extent], inside

    def _extent_of(self, shard: int) -> tuple[int, int, int]:
        """Return a shard's extent, and that extent's first shard and row."""
        first_shard = first_row = 0
        for i, (extent, shards) in enumerate(zip(self.extents, self.extent_shards, strict=True)):
            if shard < first_shard + shards:
                return i, first_shard, first_row
            first_shard, first_row = first_shard + shards, first_row + extent.rows
        raise IndexError(f"shard {shard} of {first_shard}")


@dataclass(frozen=True)
class Manifest:
    """What a source holds and how it was made."""

    source: str
    seq_len: int
    vocab_size: int
    dtype: str  # of an id: "<u2" or "<u4"
    tokenizer_sha256: str
    validation_fraction: float
    splits: dict[str, Split]
    format: int = FORMAT


def shard_name(split: str, shard: int) -> str:
    """Return the file name of a shard."""
    return f"{split}-{shard:06d}.tar"


def documents_name(split: str, shard: int) -> str:
    """Return the file name of the index of a shard's documents."""
    return f"index/{split}-{shard:06d}.documents.gz"


def checksums_name(split: str, shard: int) -> str:
    """Return the name of the file that holds a shard's checksum."""
    return f"index/{split}-{shard // CHECKSUM_BLOCK:04d}.sha256"


def checksum_line(split: str, shard: int, sha256: str) -> str:
    """Return a shard's line in its file of checksums: as sha256sum writes it, all of one length."""
    return f"{sha256}  {shard_name(split, shard)}\n"


def checksum_of(content: bytes, split: str, shard: int) -> str | None:
    """Return the checksum of a shard by the content of its file of checksums, None where that does not hold it."""
    length = len(checksum_line(split, shard, "0" * 64))
    line = content[shard % CHECKSUM_BLOCK * length :][:length].decode("ascii", "replace")
    return line[:64] if line == checksum_line(split, shard, line[:64]) else None


def checksum_blocks(split: str, sha256: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, content) of the files that hold the checksums of all shards of a split."""
    for start in range(0, len(sha256), CHECKSUM_BLOCK):
        block = sha256[start : start + CHECKSUM_BLOCK]
        yield (
            checksums_name(split, start),
            "".join(checksum_line(split, start + i, digest) for i, digest in enumerate(block)),
        )


def parse_manifest(content: bytes, place: str) -> Manifest:
    """Return the manifest that `content`, read from `place`, spells.

    Raises:
        UserError: it is damaged or of another format.
    """
    try:
        raw = json.loads(content)
        if raw["format"] != FORMAT:
            raise UserError(f"{place}: format {raw['format']}, this program reads {FORMAT}; {REBUILD}")
        splits = {name: _split(split) for name, split in raw["splits"].items()}
        return Manifest(**{**raw, "splits": splits})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: not a manifest of shards ({type(error).__name__}: {error}); {REBUILD}") from None


def _split(raw: dict) -> Split:
    extents = tuple(Extent(**extent) for extent in raw["extents"])
    return Split(raw["rows_per_shard"], extents, tuple(raw["bad"]))


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Write the manifest in one step: a folder with a manifest is a source that was built to its end."""
    write_whole(os.path.join(folder, MANIFEST), json.dumps(asdict(manifest), indent=1).encode())


def write_whole(path: str, content: bytes) -> None:
    """Write a file that is there with all its content, on the disk, or not at all."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(content)
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
