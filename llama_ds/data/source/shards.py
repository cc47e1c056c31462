"""Reading packed rows: the shards of a source, fetched and checked before their first use, read by offset.

A shard's size and checksum are checked once; then a row is one positioned read of an open file. Files are read, not
mapped: one that is cut short under a map would kill the process without a word.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from llama_ds.data.source import tar_rows
from llama_ds.data.source.manifest import (
    MANIFEST,
    Manifest,
    checksum_of,
    checksums_name,
    parse_manifest,
    shard_name,
)
from llama_ds.data.source.store import BadFile, LocalStore, Store, open_store
from llama_ds.errors import UserError

OPEN_SHARDS = 32  # files kept open per source
CHUNK = 1 << 24  # bytes of a shard whose headers are checked at a time


def read_manifest(store: Store) -> Manifest:
    """Read the manifest of the source in `store`.

    Raises:
        UserError: it cannot be had (also after a build that did not finish), or is damaged or of another format.
    """
    place = f"{store.place.rstrip('/')}/{MANIFEST}"
    try:
        return parse_manifest(store.read(MANIFEST), place)
    except BadFile as error:
        raise UserError(
            f"{place}: cannot read the shards' manifest ({error.reason}); build the source with tools/shards.py build"
        ) from None


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
        self._paths: dict[int, str] = {}  # of shards that were found sound
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recently used first
        self._checksums = lru_cache(maxsize=4)(store.read)

    def check(self, shard: int) -> str:
        """Fetch a shard and check it, unless that is done already; return the file's path.

        Threads may check different shards at once.

        Raises:
            BadFile: with the reason, and the offset of the damage where it is known.
            UserError: there is no room for it.
        """
        if shard in self._paths:
            return self._paths[shard]
        name = shard_name(self.split, shard)
        sums = checksums_name(self.split, shard)
        sha256 = checksum_of(self._checksums(sums), self.split, shard)
        if sha256 is None:
            raise BadFile(f"{self.store.place}/{name}", f"{sums} holds no checksum of it")
        self._paths[shard] = self.store.fetch(name, self.shard_bytes(shard), sha256)
        return self._paths[shard]

    def shard_bytes(self, shard: int) -> int:
        """Return the size that a shard's file has when it is whole."""
        return tar_rows.shard_bytes(len(self.geometry.shard_rows(shard)), self.seq_len, self._dtype)

    def first_damage(self, shard: int, path: str) -> int | None:
        """Return the offset of the first byte in a shard's file that is wrong whatever its ids are, or None."""
        rows, at_once = self.geometry.shard_rows(shard), max(1, CHUNK // self._stride)
        if (size := os.path.getsize(path)) != self.shard_bytes(shard):
            return min(size, self.shard_bytes(shard))
        for start in range(0, len(rows), at_once):
            data = self._members(path, start, min(at_once, len(rows) - start))
            damage = tar_rows.first_damage(data, rows[start], self.seq_len, self._dtype)
            if damage is not None:
                return start * self._stride + damage
        return None

    def offset_of(self, shard: int, error: BadFile) -> int | None:
        """Return where the damage of a shard is, as far as it can be seen: in a local file by its headers."""
        path = os.path.join(self.store.place, shard_name(self.split, shard))
        return self.first_damage(shard, path) if error.offset is None and os.path.isfile(path) else error.offset

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the ids of rows of the split, (len(rows), seq_len + 1), by their numbers. One thread at a time.

        Raises:
            BadFile: as `check`; or a shard changed after it was checked.
        """
        out = np.empty((len(rows), self.seq_len + 1), self._dtype)
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.rows):
            raise IndexError(f"rows {rows.min()} .. {rows.max()} of {self.rows} in {self.store.place} ({self.split})")
        shards, inside = self.geometry.locate(rows)
        offsets = inside * self._stride + tar_rows.BLOCK
        for i, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist(), strict=True)):
            if os.preadv(self._file(shard), [out[i]], offset) != self._width:
                raise BadFile(self._paths[shard], "was cut short after it had been checked", offset)
        return out

    def row(self, i: int) -> np.ndarray:
        """Return row `i`, (seq_len + 1,)."""
        return self.read(np.array([i]))[0]

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all rows in order, a shard (rows, seq_len + 1) at a time."""
        return (self.rows_of(shard) for shard in range(self.geometry.shards))

    def rows_of(self, shard: int) -> np.ndarray:
        """Return all rows of a shard, (rows, seq_len + 1). Raises BadFile."""
        data = self._members(self.check(shard), 0, len(self.geometry.shard_rows(shard)))
        return tar_rows.rows_of(data, self.seq_len, self._dtype)

    def close(self) -> None:
        """Close the files that are open."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _file(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) == OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        try:
            self._open[shard] = os.open(self.check(shard), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # the cache needed its room since it was checked
            del self._paths[shard]
            self._open[shard] = os.open(self.check(shard), os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]

    def _members(self, path: str, start: int, count: int) -> np.ndarray:
        data = np.fromfile(path, np.uint8, count * self._stride, offset=start * self._stride)
        return data.reshape(count, self._stride)


def open_source(place: str, split: str) -> Source:
    """Open one split ("train" or "validation") of the source in a folder.

    Raises:
        UserError: no manifest, or no such split.
    """
    store = open_store(place)
    manifest = read_manifest(store)
    if split not in manifest.splits:
        raise UserError(f"{place}: no split '{split}'; it holds {', '.join(manifest.splits)}")
    return Source(store, manifest, split)


def check_present(source: Source) -> None:
    """Check that a local folder has a file for every shard of `source`: a copy that was not finished.

    Raises:
        UserError: naming the first that is not there.
    """
    if not isinstance(source.store, LocalStore):
        return
    names = set(os.listdir(source.store.place))
    for shard in range(source.geometry.shards):
        if shard not in source.geometry.bad and shard_name(source.split, shard) not in names:
            raise UserError(
                f"{source.store.place}/{shard_name(source.split, shard)}: the shard is missing, its manifest names "
                f"{source.geometry.shards}; copy it again, or leave it out with tools/shards.py verify --repair"
            )
