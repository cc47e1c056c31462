"""Verifying a source: the checksum of every shard, and every header, id and document against the manifest.

As an independent check, webdataset reads the first shard of each split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from llama_ds.data.source import tar_rows
from llama_ds.data.source.documents_index import IndexedDocument, parse_documents
from llama_ds.data.source.manifest import documents_name, write_manifest
from llama_ds.data.source.shards import Source, read_manifest
from llama_ds.data.source.store import BadFile, LocalStore, Store
from llama_ds.errors import UserError


@dataclass(frozen=True)
class Damage:
    """A damaged shard: its file does not match the manifest or the checksums."""

    split: str
    shard: int
    reason: str
    offset: int | None


def verify_source(store: Store, workers: int = 1, progress: Callable[[int], None] = lambda rows: None) -> list[Damage]:
    """Return all damaged shards of the source in `store`; `progress` is called with the row count of each shard.

    Raises:
        UserError: the manifest itself cannot be read.
    """
    manifest = read_manifest(store)
    found = []
    pool = ThreadPoolExecutor(workers)  # hashing and numpy release the GIL
    try:
        for name in manifest.splits:
            source = Source(store, manifest, name)
            shards = range(source.geometry.shards)
            for shard, damage in zip(shards, _in_order(pool, source, shards, 2 * workers), strict=True):
                progress(len(source.geometry.shard_rows(shard)))
                if damage:
                    found.append(damage)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, only the shards in progress delay the end
    return found


def repair(store: Store, damages: list[Damage]) -> None:
    """List exactly the shards of `damages` as damaged in the manifest, so that runs read other shards instead.

    Raises:
        UserError: the source is not a folder, or a split would have no intact shard.
    """
    if not isinstance(store, LocalStore):
        raise UserError(
            f"{store.location}: the manifest of a remote source cannot be changed; repair the source where it is stored"
        )
    manifest = read_manifest(store)
    splits = {}
    for name, split in manifest.splits.items():
        bad = tuple(sorted(damage.shard for damage in damages if damage.split == name))
        if split.shards and len(bad) == split.shards:
            raise UserError(f"{store.location}: none of the {split.shards} {name} shards is intact; rebuild the source")
        splits[name] = replace(split, bad=bad)
    write_manifest(store.location, replace(manifest, splits=splits))


def _in_order(pool: ThreadPoolExecutor, source: Source, shards: range, ahead: int) -> Iterator[Damage | None]:
    running = [pool.submit(_damage, source, shard) for shard in shards[:ahead]]
    for shard in range(ahead, len(shards) + ahead):
        yield running.pop(0).result()
        if shard < len(shards):
            running.append(pool.submit(_damage, source, shard))


def _damage(source: Source, shard: int) -> Damage | None:
    try:
        path = source.check(shard)
        offset = source.first_damage(shard, path)
        if offset is not None:
            raise BadFile(path, "not a valid tar header or padding of a row", offset)
        _check_ids(source, shard, path)
        if shard == 0:
            _check_with_webdataset(source, path)
    except BadFile as error:
        return Damage(source.split, shard, str(error), source.offset_of(shard, error))
    return None


def _check_with_webdataset(source: Source, path: str) -> None:
    """Read the first shard with webdataset; headers of the other shards differ only in the row numbers."""
    from webdataset import WebDataset  # imported late, because it imports torch

    rows = source.rows_of(0)
    name = tar_rows.extension(rows.dtype)
    found = [sample.get(name, b"") for sample in WebDataset(path, shardshuffle=False, empty_check=False)]
    if found != [row.tobytes() for row in rows]:
        raise BadFile(path, f"webdataset reads {len(found)} samples that differ from the {len(rows)} rows")


def _check_ids(source: Source, shard: int, path: str) -> None:
    rows = source.rows_of(shard)
    if int(rows.max()) >= source.vocab_size:
        raise BadFile(path, f"holds id {rows.max()}, outside vocab_size {source.vocab_size}")
    name = documents_name(source.split, shard)
    path = f"{source.store.location}/{name}"
    try:
        documents = parse_documents(source.store.read(name), path)
    except UserError as error:
        raise BadFile(path, str(error)) from None
    if reason := _index_error(documents, np.append(rows[:, :-1].ravel(), rows[-1, -1])):
        raise BadFile(path, reason)


def _index_error(documents: list[IndexedDocument], ids: np.ndarray) -> str | None:
    """Return how the index of a shard contradicts its ids (ids,), which have an eos exactly where a document ends."""
    if not documents:
        return "names no document, but the shard holds ids of one"
    ends = np.array([d.start + d.length - 1 for d in documents], np.int64)
    filler = ids[ends[-1] + 1 :]  # the last row of an extent is padded with eos
    ends = ends[(ends >= 0) & (ends < len(ids))]
    if not len(ends):
        return None
    eos = ids[ends[0]]
    found = np.flatnonzero(ids[: len(ids) - len(filler)] == eos)
    if not np.array_equal(found, ends) or (filler != eos).any():
        return f"names {len(ends)} documents that end in the shard, but its ids have {len(found)} at other positions"
    return None
