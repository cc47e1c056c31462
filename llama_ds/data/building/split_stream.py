"""The id stream of a split, to which parts are appended, and the progress of its shards."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from llama_ds.data.building.shard_writer import Span, WriteShard, WrittenShard, read_shard
from llama_ds.data.building.tokenized import ids_path
from llama_ds.data.source.manifest import Extent, Split, extent_digest, rows_of


@dataclass(frozen=True)
class ShardForm:
    """Settings shared by all shards of a build."""

    folder: str
    build: str
    seq_len: int
    rows_per_shard: int
    dtype: str
    eos_id: int


class SplitStream:
    """The documents of a split in order, cut into shards. Positions and shards count from the start of this build."""

    def __init__(self, form: ShardForm, split: str, base: Split | None) -> None:
        self.documents = self.ids = 0
        self._form, self._split = form, split
        self._base = base or Split(form.rows_per_shard, ())
        self._shard_ids = form.rows_per_shard * form.seq_len  # ids from the start of a shard to the start of the next
        self._spans: deque[Span] = deque()
        self._is_complete = False
        self._next = 0
        self._sha256: dict[int, str] = {}
        self._done = 0  # shards 0 .. done - 1 are written

    def add(self, span: Span, documents: int) -> None:
        """Append the documents of a part."""
        self.documents += documents
        self.ids += span.ids
        if span.ids:
            self._spans.append(span)

    def end(self) -> None:
        """Mark the stream as complete: no part follows."""
        self._is_complete = True

    @property
    def is_written(self) -> bool:
        """Whether all shards are written."""
        return self._is_complete and self._done * self._form.rows_per_shard >= self.rows

    @property
    def rows(self) -> int:
        """Number of rows for the ids so far."""
        return rows_of(self.ids, self._form.seq_len)

    @property
    def sha256(self) -> list[str]:
        """Checksums of the shards of this build."""
        return [self._sha256[shard] for shard in range(self._done)]

    def result(self) -> Split:
        """Return the split including the extent that this build added."""
        added = (Extent(self.rows, self.documents, self.ids, extent_digest(self.sha256)),) if self.documents else ()
        return Split(self._base.rows_per_shard, (*self._base.extents, *added), self._base.bad)

    def next_task(self) -> WriteShard | None:
        """Return the task for the next shard that is not written yet, or None while its ids are incomplete."""
        while rows := self._rows_ready():
            shard = self._next
            self._next += 1
            form, number = self._form, self._base.shards + shard
            if done := read_shard(form.folder, form.build, self._split, number):
                self.take(done)
                continue
            first_row = self._base.rows + shard * form.rows_per_shard
            return WriteShard(
                form.folder, form.build, self._split, number, first_row, rows, shard * self._shard_ids,
                form.seq_len, form.dtype, form.eos_id, tuple(self._spans_of(shard)),
            )  # fmt: skip
        return None

    def take(self, shard: WrittenShard) -> None:
        """Record a shard as written, and delete the ids of parts that no other shard needs."""
        self._sha256[shard.shard - self._base.shards] = shard.sha256
        while self._done in self._sha256:
            self._done += 1
        while self._spans and self._spans[0].start + self._spans[0].ids <= self._done * self._shard_ids:
            with suppress(FileNotFoundError):
                os.remove(ids_path(self._form.build, self._spans.popleft().number, self._split))

    def _rows_ready(self) -> int:
        start = self._next * self._shard_ids
        if self.ids > start + self._shard_ids:
            return self._form.rows_per_shard
        return max(0, self.rows - self._next * self._form.rows_per_shard) if self._is_complete else 0

    def _spans_of(self, shard: int) -> Iterator[Span]:
        start = shard * self._shard_ids
        stop = start + self._shard_ids + 1
        for span in self._spans:
            if span.start >= stop:
                return
            if span.start + span.ids > start:
                yield span
