"""Verifying a source: every shard's checksum, and every header, id and document against the manifest.

webdataset has its say too: it reads the first shard of each split.
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
    """A shard that is not what its source's manifest says."""

    split: str
    shard: int
    reason: str
    offset: int | None


def verify_source(store: Store, workers: int = 1, progress: Callable[[int], None] = lambda rows: None) -> list[Damage]:
    """Return every damaged shard of the source in `store`; `progress` is called with the rows of each shard.

    Raises:
        UserError: the manifest itself cannot be read.
    """
    manifest = read_manifest(store)
    found = []
    with ThreadPoolExecutor(workers) as pool:  # hashing and numpy let other threads run
        for name in manifest.splits:
            source = Source(store, manifest, name)
            shards = range(source.geometry.shards)
            for shard, damage in zip(shards, _in_order(pool, source, shards, 2 * workers), strict=True):
                progress(len(source.geometry.shard_rows(shard)))
                if damage:
                    found.append(damage)
    return found


def repair(store: Store, damages: list[Damage]) -> None:
    """Have the manifest list as damaged what was found so, and nothing else: runs will read other shards instead.

    Raises:
        UserError: the source is not in a folder, or a split would have no sound shard.
    """
    if not isinstance(store, LocalStore):
        raise UserError(
            f"{store.place}: a manifest behind a URL cannot be changed from here; repair it where it is stored"
        )
    manifest = read_manifest(store)
    splits = {}
    for name, split in manifest.splits.items():
        bad = tuple(sorted(damage.shard for damage in damages if damage.split == name))
        if split.shards and len(bad) == split.shards:
            raise UserError(f"{store.place}: none of the {split.shards} {name} shards is sound; rebuild the source")
        splits[name] = replace(split, bad=bad)
    write_manifest(store.place, replace(manifest, splits=splits))


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
            raise BadFile(path, "no tar header, or padding, of a row where it should stand", offset)
        _check_ids(source, shard, path)
        if shard == 0:
            _check_with_webdataset(source, path)
    except BadFile as error:
        return Damage(source.split, shard, str(error), source.offset_of(shard, error))
    return None


def _check_with_webdataset(source: Source, path: str) -> None:
    """Let webdataset itself read the first shard: the others have the same headers but for the numbers of rows."""
    from webdataset import WebDataset  # here: it imports torch

    rows = source.rows_of(0)
    name = tar_rows.extension(rows.dtype)
    found = [sample.get(name, b"") for sample in WebDataset(path, shardshuffle=False, empty_check=False)]
    if found != [row.tobytes() for row in rows]:
        raise BadFile(path, f"webdataset finds {len(found)} samples in it that are not its {len(rows)} rows")


def _check_ids(source: Source, shard: int, path: str) -> None:
    rows = source.rows_of(shard)
    if int(rows.max()) >= source.vocab_size:
        raise BadFile(path, f"holds id {rows.max()}, outside vocab_size {source.vocab_size}")
    name = documents_name(source.split, shard)
    place = f"{source.store.place}/{name}"
    try:
        documents = parse_documents(source.store.read(name), place)
    except UserError as error:
        raise BadFile(place, str(error)) from None
    if reason := _misplaced(documents, np.append(rows[:, :-1].ravel(), rows[-1, -1])):
        raise BadFile(place, reason)


def _misplaced(documents: list[IndexedDocument], ids: np.ndarray) -> str | None:
    """Hold the index of a shard against its ids, in one line (ids,): a bos where each document begins, and no other."""
    starts = np.array([d.start for d in documents if 0 <= d.start < len(ids)], np.int64)
    if not len(starts):
        return None if documents else "names no document, and the shard has ids of one"
    bos = ids[starts[0]]
    if not np.array_equal(np.flatnonzero(ids == bos), starts):
        return (
            f"names {len(starts)} documents that begin in the shard, whose ids have {int((ids == bos).sum())} elsewhere"
        )
    return None
