"""Collecting the report of a source: its document indexes in one pass, and a sample of its rows.

Memory does not grow with the source. Of its shards only the few are read that hold the sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from llama_ds.data.report.duplicates import Copies, DigestSample
from llama_ds.data.report.lengths import Lengths
from llama_ds.data.source.documents_index import IndexedDocument
from llama_ds.data.source.manifest import Manifest, Split, check_tokenizer, shard_name
from llama_ds.data.source.shards import Source, read_manifest
from llama_ds.data.source.store import BadFile, Store
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

SAMPLED_SHARDS = 4
ROWS_PER_SHARD = 64  # rows decoded for bytes per token
MOST_COPIED = 10
BATCH = 64  # shards whose indexes are read ahead


@dataclass(frozen=True)
class SampleRow:
    """A row for people to read."""

    shard: str
    row: int  # row number in the shard
    places: tuple[str, ...]  # file, or file:line, of each document in it
    text: str


@dataclass(frozen=True)
class RowSample:
    """What decoded rows say of a source."""

    rows: int  # number of rows that were decoded
    bytes_per_token: float  # UTF-8 bytes of text per token, without bos and eos
    shown: tuple[SampleRow, ...]


@dataclass(frozen=True)
class SourceReport:
    """The report of one source."""

    folder: str
    manifest: Manifest
    lengths: Lengths
    digests: DigestSample
    sample: RowSample | None  # None: no tokenizer was given

    @property
    def unread(self) -> int:
        """Number of shards without a report, because the manifest lists them as damaged."""
        return sum(len(split.bad) for split in self.manifest.splits.values())

    @property
    def most_copied(self) -> list[Copies]:
        """The texts with the most documents."""
        return self.digests.most_copied(MOST_COPIED)


def collect(
    store: Store,
    tokenizer: Tokenizer | None,
    samples: int,
    workers: int = 1,
    progress: Callable[[int], object] = lambda shards: None,
) -> SourceReport:
    """Return the report of the source in `store`; `progress` is called with the number of shards just done.

    Raises:
        UserError: the tokenizer is another one, or an index or a sampled shard is missing or damaged.
    """
    manifest = read_manifest(store)
    if tokenizer:
        check_tokenizer(manifest, tokenizer)
    lengths, digests = Lengths(), DigestSample()
    for name in manifest.splits:
        source = Source(store, manifest, name)
        for documents in _indexes(source, workers):
            lengths.add(np.array([document.length for document in documents], np.int64))
            for document in documents:
                digests.add(document.digest, document.place)
            progress(1)
    sample = _sample(Source(store, manifest, "train"), tokenizer, samples) if tokenizer else None
    return SourceReport(store.location, manifest, lengths, digests, sample)


def shards_to_read(manifest: Manifest) -> int:
    """Return the number of shards that `collect` reports as done."""
    return sum(split.shards - len(split.bad) for split in manifest.splits.values())


def _indexes(source: Source, workers: int) -> Iterator[list[IndexedDocument]]:
    """Yield the documents that begin in each intact shard."""
    split = source.geometry
    intact = [shard for shard in range(split.shards) if shard not in split.bad]
    pool = ThreadPoolExecutor(workers)
    try:
        for start in range(0, len(intact), BATCH):
            yield from pool.map(lambda shard: _beginning(source, shard), intact[start : start + BATCH])
    finally:
        pool.shutdown(cancel_futures=True)


def _beginning(source: Source, shard: int) -> list[IndexedDocument]:
    # The last id of a shard is also the first of the next: a document that begins there belongs to the next.
    stop = len(source.geometry.shard_rows(shard)) * source.seq_len
    return [document for document in source.documents(shard) if 0 <= document.start < stop]


def _sample(source: Source, tokenizer: Tokenizer, samples: int) -> RowSample:
    rows = _sampled_rows(source.geometry)
    try:
        ids = source.read(rows)
    except BadFile as error:
        raise UserError(f"{error}; copy the shard again, or exclude it with tools/shards.py verify --repair") from None
    labels = source.geometry.labels(rows, source.seq_len)
    size = tokens = 0
    for row, count in zip(ids, labels.tolist(), strict=True):
        real = row[1 : 1 + count]  # labels: each id of the source at most once
        text_ids = real[(real != tokenizer.bos_id) & (real != tokenizer.eos_id)]
        size += len(tokenizer.decode(text_ids).encode("utf-8", "replace"))
        tokens += len(text_ids)
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(samples, len(rows))).astype(np.int64))
    shown = tuple(_shown(source, int(rows[i]), ids[i][: 1 + labels[i]], tokenizer) for i in chosen)
    return RowSample(len(rows), size / max(1, tokens), shown)


def _sampled_rows(split: Split) -> np.ndarray:
    """Return evenly spaced rows of evenly spaced intact shards."""
    intact = np.array([shard for shard in range(split.shards) if shard not in split.bad])
    if not len(intact):
        return np.empty(0, np.int64)
    shards = intact[np.unique(np.linspace(0, len(intact) - 1, SAMPLED_SHARDS).astype(np.int64))]
    ranges = [split.shard_rows(int(shard)) for shard in shards]
    picked = [np.unique(np.linspace(r.start, r.stop - 1, min(len(r), ROWS_PER_SHARD)).astype(np.int64)) for r in ranges]
    return np.concatenate(picked)


def _shown(source: Source, row: int, ids: np.ndarray, tokenizer: Tokenizer) -> SampleRow:
    (shard,), (inside,) = (part.tolist() for part in source.geometry.locate(np.array([row])))
    first, last = inside * source.seq_len, (inside + 1) * source.seq_len
    within = [d.place for d in source.documents(shard) if d.start < last and d.start + d.length > first]
    return SampleRow(shard_name(source.split, shard), inside, tuple(within), tokenizer.decode(ids))
