"""Reading packed rows: shards are fetched and checked before their first use, and rows are read by offset.

The size and checksum of a shard are checked once; then a row is one positioned read of an open file. Files are not
memory-mapped, because truncating a mapped file would kill the process with SIGBUS.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np

from llama_ds.data.source import tar_rows
from llama_ds.data.source.documents_index import IndexedDocument, parse_documents
from llama_ds.data.source.manifest import (
    MANIFEST,
    Manifest,
    Split,
    checksum_of,
    checksums_name,
    documents_name,
    extent_digest,
    parse_manifest,
    shard_name,
)
from llama_ds.data.source.store import BadFile, LocalStore, Store, open_store
from llama_ds.errors import UserError

OPEN_SHARDS = 32  # files kept open per source
CHUNK = 1 << 24  # bytes of a shard per header check


def read_manifest(store: Store) -> Manifest:
    """Read the manifest of the source in `store`.

    Raises:
        UserError: it is missing (for example after an unfinished build), damaged or of another format.
    """
    path = f"{store.location.rstrip('/')}/{MANIFEST}"
    try:
        return parse_manifest(store.read(MANIFEST), path)
    except BadFile as error:
        raise UserError(
            f"{path}: cannot read the shards' manifest ({error.reason}); build the source with tools/shards.py build"
        ) from None


def with_digests(store: Store, manifest: Manifest) -> Manifest:
    """Return the manifest with the digest of every extent; manifests of older versions get it from the checksums.

    An extent whose checksums cannot be read stays without a digest: reading its shards reports that.
    """
    splits = {name: _with_digests(store, name, split) for name, split in manifest.splits.items()}
    return replace(manifest, splits=splits)


def _with_digests(store: Store, name: str, split: Split) -> Split:
    if all(extent.sha256 for extent in split.extents):
        return split
    files = lru_cache(maxsize=1)(store.read)
    extents, first = [], 0
    try:
        for extent, shards in zip(split.extents, split.extent_shards, strict=True):
            sums = [checksum_of(files(checksums_name(name, i)), name, i) for i in range(first, first + shards)]
            extents.append(replace(extent, sha256=extent_digest([s for s in sums if s]) if all(sums) else ""))
            first += shards
    except BadFile:
        return split
    return replace(split, extents=tuple(extents))


class Source:
    """The rows of one split of one source."""

    def __init__(self, store: Store, manifest: Manifest, split: str) -> None:
        self.store, self.name, self.split = store, manifest.source, split
        self.seq_len, self.vocab_size = manifest.seq_len, manifest.vocab_size
        self.tokenizer_sha256 = manifest.tokenizer_sha256
        self.geometry = manifest.splits[split]
        self.rows = self.geometry.rows
        self._dtype = np.dtype(manifest.dtype)
        self._stride = tar_rows.stride(self.seq_len, self._dtype)
        self._width = (self.seq_len + 1) * self._dtype.itemsize
        self._paths: dict[int, str] = {}  # paths of the shards checked so far
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recently used first
        self._checksums = lru_cache(maxsize=4)(store.read)
        weakref.finalize(self, _close, self._open)  # each stage of a run opens its sources anew

    def check(self, shard: int) -> str:
        """Fetch and check a shard on its first use; return the path of its file.

        Threads may check different shards concurrently.

        Raises:
            BadFile: the shard is missing or damaged.
            UserError: there is no space for it.
        """
        if shard in self._paths:
            return self._paths[shard]
        name = shard_name(self.split, shard)
        sums = checksums_name(self.split, shard)
        sha256 = checksum_of(self._checksums(sums), self.split, shard)
        if sha256 is None:
            raise BadFile(f"{self.store.location}/{name}", f"{sums} has no checksum of this shard")
        self._paths[shard] = self.store.fetch(name, self.shard_bytes(shard), sha256)
        return self._paths[shard]

    def shard_bytes(self, shard: int) -> int:
        """Return the size in bytes of a complete shard file."""
        return tar_rows.shard_bytes(len(self.geometry.shard_rows(shard)), self.seq_len, self._dtype)

    def first_damage(self, shard: int, path: str) -> int | None:
        """Return the offset of the first wrong header or padding byte in a shard's file, or None."""
        rows, chunk_rows = self.geometry.shard_rows(shard), max(1, CHUNK // self._stride)
        if (size := os.path.getsize(path)) != self.shard_bytes(shard):
            return min(size, self.shard_bytes(shard))
        for start in range(0, len(rows), chunk_rows):
            data = self._members(path, start, min(chunk_rows, len(rows) - start))
            damage = tar_rows.first_damage(data, rows[start], self.seq_len, self._dtype)
            if damage is not None:
                return start * self._stride + damage
        return None

    def offset_of(self, shard: int, error: BadFile) -> int | None:
        """Return the offset of the damage in a shard if known, for a local file also by checking its headers."""
        path = os.path.join(self.store.location, shard_name(self.split, shard))
        return self.first_damage(shard, path) if error.offset is None and os.path.isfile(path) else error.offset

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the ids of rows of the split, (len(rows), seq_len + 1), by their row numbers. Not thread-safe.

        Raises:
            BadFile: as in `check`, or a shard changed after it was checked.
        """
        out = np.empty((len(rows), self.seq_len + 1), self._dtype)
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.rows):
            raise IndexError(
                f"rows {rows.min()} .. {rows.max()} of {self.rows} in {self.store.location} ({self.split})"
            )
        shards, shard_rows = self.geometry.locate(rows)
        offsets = shard_rows * self._stride + tar_rows.BLOCK
        for i, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist(), strict=True)):
            if os.preadv(self._file(shard), [out[i]], offset) != self._width:
                raise BadFile(self._paths[shard], "was cut short after it had been checked", offset)
        return out

    def row(self, i: int) -> np.ndarray:
        """Return row `i`, (seq_len + 1,)."""
        return self.read(np.array([i]))[0]

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all rows in order, one array (rows, seq_len + 1) per shard."""
        return (self.rows_of(shard) for shard in range(self.geometry.shards))

    def rows_of(self, shard: int) -> np.ndarray:
        """Return all rows of a shard, (rows, seq_len + 1). Raises BadFile."""
        data = self._members(self.check(shard), 0, len(self.geometry.shard_rows(shard)))
        return tar_rows.rows_of(data, self.seq_len, self._dtype)

    def documents(self, shard: int) -> list[IndexedDocument]:
        """Return the index of the documents that overlap a shard.

        Raises:
            UserError: the index is missing or damaged.
        """
        name = documents_name(self.split, shard)
        try:
            return parse_documents(self.store.read(name), f"{self.store.location}/{name}")
        except BadFile as error:
            raise UserError(f"{error}; copy the source's folder index/ too") from None

    def _file(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) == OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        try:
            self._open[shard] = os.open(self.check(shard), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # the cache evicted it after the check
            del self._paths[shard]
            self._open[shard] = os.open(self.check(shard), os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]

    def _members(self, path: str, start: int, count: int) -> np.ndarray:
        data = np.fromfile(path, np.uint8, count * self._stride, offset=start * self._stride)
        return data.reshape(count, self._stride)


def open_source(folder: str, split: str) -> Source:
    """Open one split ("train" or "validation") of the source in a folder.

    Raises:
        UserError: the source has no manifest or no such split.
    """
    store = open_store(folder)
    manifest = read_manifest(store)
    if split not in manifest.splits:
        raise UserError(f"{folder}: has no split '{split}'; use one of {', '.join(manifest.splits)}")
    return Source(store, manifest, split)


def check_present(source: Source) -> None:
    """Check that a local folder has a file for every shard of `source`, to detect an incomplete copy.

    Raises:
        UserError: a shard is missing; names the first one.
    """
    if not isinstance(source.store, LocalStore):
        return
    names = set(os.listdir(source.store.location))
    for shard in range(source.geometry.shards):
        if shard not in source.geometry.bad and shard_name(source.split, shard) not in names:
            raise UserError(
                f"{source.store.location}/{shard_name(source.split, shard)}: the shard is missing, its manifest names "
                f"{source.geometry.shards}; copy it again, or exclude it with tools/shards.py verify --repair"
            )


def _close(files: OrderedDict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])
