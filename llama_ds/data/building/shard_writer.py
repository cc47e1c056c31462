"""Writing a shard from the tokenized parts that it spans, independently of all other shards.

Positions count the ids of a split from the first id of this build. Shard k of R rows of T + 1 ids holds the positions
k*R*T .. (k+1)*R*T.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from llama_ds.data.building.packing import pack
from llama_ds.data.building.tokenized import documents_path, ids_path
from llama_ds.data.building.write_errors import atomic_writer
from llama_ds.data.source import tar_rows
from llama_ds.data.source.documents_index import DIGEST_BYTES, IndexedDocument, write_documents
from llama_ds.data.source.manifest import documents_name, shard_name

CHUNK_BYTES = 8 << 20  # bytes per write


@dataclass(frozen=True)
class Span:
    """A tokenized part, and the positions of its documents in a split."""

    number: int
    start: int  # position of its first id
    ids: int
    copies: np.ndarray  # indices of its documents (both splits) that deduplication leaves out
    files: tuple[tuple[str, int], ...]  # path of each piece, and number of lines of the file before it


@dataclass(frozen=True)
class WrittenShard:
    """A finished shard; `shard` is its number in the split."""

    split: str
    shard: int
    sha256: str


@dataclass(frozen=True)
class WriteShard:
    """Task that writes a shard of `folder`."""

    folder: str
    build: str
    split: str
    shard: int
    first_row: int  # row number in the split
    rows: int
    start: int  # position of the first id
    seq_len: int
    dtype: str
    eos_id: int
    spans: tuple[Span, ...]

    def run(self) -> Iterator[WrittenShard]:
        """Write the document index, then the checksum record, then rename the tar to its final name; yield the record.

        Raises:
            UserError: the disk is full.
        """
        dtype = np.dtype(self.dtype)
        size = tar_rows.shard_bytes(self.rows, self.seq_len, dtype)
        documents = [_Documents.of(self, span) for span in self.spans]
        sha256 = hashlib.sha256()
        with atomic_writer(os.path.join(self.folder, shard_name(self.split, self.shard)), size) as tar:
            for data in self._content(documents, dtype):
                sha256.update(data)
                tar.write(data)
            end = bytes(size - tar.tell())
            sha256.update(end)
            tar.write(end)
            with atomic_writer(os.path.join(self.folder, documents_name(self.split, self.shard))) as index:
                write_documents(index, (entry for d in documents for entry in d.entries(self.start)))
            shard = WrittenShard(self.split, self.shard, sha256.hexdigest())
            with atomic_writer(_record_path(self.build, self.split, self.shard)) as record:
                record.write(json.dumps(asdict(shard)).encode())
        yield shard

    @property
    def stop(self) -> int:
        """Position after the last id."""
        return self.start + self.rows * self.seq_len + 1

    def _content(self, documents: Sequence[_Documents], dtype: np.dtype) -> Iterator[memoryview]:
        rows = max(1, CHUNK_BYTES // tar_rows.stride(self.seq_len, dtype))
        runs = (run for d in documents for run in d.runs(dtype, self.start, self.stop))
        row = self.first_row
        for ids in pack(runs, self.seq_len, dtype, self.eos_id, min(rows, self.rows)):
            yield tar_rows.members(row, ids).reshape(-1).data
            row += len(ids)


@dataclass(frozen=True)
class _Documents:
    """The documents of a part that overlap a shard: offsets in the part's file of ids, and positions in the split."""

    path: str
    files: tuple[tuple[str, int], ...]
    records: np.ndarray
    offsets: np.ndarray  # offsets in the file of ids
    positions: np.ndarray  # positions in the split

    @classmethod
    def of(cls, shard: WriteShard, span: Span) -> _Documents:
        records = np.load(documents_path(shard.build, span.number))
        kept = np.ones(len(records), bool)
        kept[span.copies] = False
        mine = records["validation"] == (shard.split == "validation")
        records, kept = records[mine], kept[mine]
        offsets = (np.cumsum(records["length"]) - records["length"])[kept]
        records = records[kept]
        positions = span.start + np.cumsum(records["length"]) - records["length"]
        overlaps = (positions < shard.stop) & (positions + records["length"] > shard.start)
        path = ids_path(shard.build, span.number, shard.split)
        return cls(path, span.files, records[overlaps], offsets[overlaps], positions[overlaps])

    def runs(self, dtype: np.dtype, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the ids at the positions start .. stop - 1, one run per gap-free range of documents in the file."""
        if not len(self.records):
            return
        ids = np.memmap(self.path, dtype, "r")
        ends = self.offsets + self.records["length"]
        gaps = np.flatnonzero(self.offsets[1:] != ends[:-1]) + 1
        for first, after in zip([0, *gaps], [*gaps, len(ends)], strict=True):
            shift = int(self.offsets[first] - self.positions[first])
            yield ids[max(int(self.offsets[first]), start + shift) : min(int(ends[after - 1]), stop + shift)]

    def entries(self, start: int) -> Iterator[IndexedDocument]:
        """Yield the index entries of a shard whose first position is `start`."""
        found = (self.records[name].tolist() for name in ("piece", "line", "length", "digest"))
        for piece, line, length, digest, position in zip(*found, self.positions.tolist(), strict=True):
            path, lines = self.files[piece]
            where = f"{path}:{lines + line}" if line else path
            yield IndexedDocument(position - start, length, digest.ljust(DIGEST_BYTES, b"\0"), where)


def read_shard(folder: str, build: str, split: str, shard: int) -> WrittenShard | None:
    """Return the record of a shard that an earlier, killed build finished, or None."""
    if not os.path.exists(os.path.join(folder, shard_name(split, shard))):
        return None
    with open(_record_path(build, split, shard), "rb") as file:
        return WrittenShard(**json.load(file))


def _record_path(build: str, split: str, shard: int) -> str:
    return os.path.join(build, f"{split}-{shard:06d}.json")
