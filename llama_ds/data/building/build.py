"""Building a source: documents -> ids -> packed rows -> webdataset tar shards and a manifest.

The input is divided into parts (parts.py). Worker processes tokenize parts (tokenized.py) in any order. This module
puts them in order, optionally deduplicates them, and starts a task to write each shard (shard_writer.py) as soon as all
its ids exist. Every file is written atomically, so a build may be killed at any moment and is resumable.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llama_ds.config.document_marks import DocumentMarks
from llama_ds.data.building import build_folder
from llama_ds.data.building.atomic_file import reporting_full_disk
from llama_ds.data.building.dedup import DIGEST, DigestSet
from llama_ds.data.building.packing import id_dtype
from llama_ds.data.building.parts import Part, plan_parts
from llama_ds.data.building.shard_writer import Span, WriteShard, WrittenShard
from llama_ds.data.building.split_stream import ShardForm, SplitStream
from llama_ds.data.building.tokenized import (
    TokenizedCounts,
    TokenizedPart,
    TokenizePart,
    documents_path,
    keep_loaded,
    read_part,
)
from llama_ds.data.building.workers import ThisProcess, Workers
from llama_ds.data.building.workers import workers as start_workers
from llama_ds.data.source.documents_index import parse_documents
from llama_ds.data.source.manifest import REBUILD, SPLITS, Manifest, check_tokenizer, documents_name, parse_manifest
from llama_ds.data.text.corpus import source_files
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError
from llama_ds.log import logger

PARTS_AHEAD = 16  # parts per worker tokenized ahead of the first unfinished part; their ids wait on disk


@dataclass(frozen=True)
class _Settings:
    """The arguments of `build_source` that determine the output."""

    tokenizer_path: str
    seq_len: int
    validation_fraction: float
    rows_per_shard: int
    document_chars: int
    dedup: bool
    skip_bad: bool


def build_source(
    name: str,
    pattern: str,
    tokenizer_path: str,
    out: str,
    seq_len: int,
    validation_fraction: float = 0.01,
    rows_per_shard: int = 16384,
    workers: int = 1,
    document_chars: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int, int], None] = lambda documents, ids, input_bytes: None,
    dedup: bool = False,
    append: bool = False,
    skip_bad: bool = False,
) -> Manifest:
    """Tokenize and pack the documents of `pattern` into the folder out/name.

    The hash of a document's text assigns it to a split: copies of a text go to the same split, and adding documents
    moves none. `dedup` keeps only the first of equal documents. `append` adds the documents to a finished source,
    whose shards stay unchanged. `skip_bad` leaves out documents that are empty, not UTF-8 or not JSON.

    Args:
        pattern: a file, a folder or a glob with `**`.
        seq_len: tokens per row; a row holds one id more, the last label.
        validation_fraction: fraction of the documents held out for validation.
        workers: number of processes that tokenize and write.
        document_chars: longer documents are cut at line ends; 0: no document is cut.
        overwrite: delete an existing finished source, or an unfinished build of other documents or flags.

    The bytes written depend on the documents, the tokenizer and the sizes, but not on `workers` or on restarts of the
    build. `progress` is called with the documents, ids and input bytes processed since its last call, and with
    (0, 0, bytes) for the work of an earlier, killed build.

    Raises:
        UserError: the source exists, a document is bad (see `documents`), a split is empty, or the disk is full.
    """
    settings = _Settings(tokenizer_path, seq_len, validation_fraction, rows_per_shard, document_chars, dedup, skip_bad)
    _check(name, settings, overwrite, append)
    tokenizer = Tokenizer(tokenizer_path)
    marks = tokenizer.marks
    keep_loaded(tokenizer)
    folder = os.path.join(out, name)
    files = source_files(pattern)
    parts = plan_parts(files)
    with reporting_full_disk(folder), build_folder.locked(folder):
        mark = build_folder.fingerprint(files, _flags(settings, tokenizer))
        if done := build_folder.finish_commit(folder, mark):
            return done
        base = _base(folder, settings, tokenizer, overwrite, append)
        if base is not None:
            mark[build_folder.APPENDS_TO] = hashlib.sha256(build_folder.finished(folder) or b"").hexdigest()
        build_folder.begin(folder, mark, base, overwrite)
        build = _Build(folder, settings, tokenizer.vocab_size, marks, parts, base)
        try:
            with start_workers(workers) as pool:
                build.run(pool, progress, workers)
        finally:
            build_folder.remove_temporary(folder)  # also on an error, because the disk may be full
        if base is None:
            _check_filled(folder, pattern, build.splits, validation_fraction)
        manifest = Manifest(
            name, seq_len, tokenizer.vocab_size, id_dtype(tokenizer.vocab_size).str, tokenizer.sha256,
            validation_fraction, {split: stream.result() for split, stream in build.splits.items()},
        )  # fmt: skip
        build_folder.commit(folder, manifest, base, {split: s.sha256 for split, s in build.splits.items()})
    build.report(name)
    return manifest


class _Build:
    """Schedules the tasks of a build, and appends tokenized parts to the split streams in order."""

    def __init__(
        self,
        folder: str,
        settings: _Settings,
        vocab_size: int,
        marks: DocumentMarks,
        parts: Sequence[Part],
        base: Manifest | None,
    ) -> None:
        self._dtype = id_dtype(vocab_size)
        self._folder = build_folder.build_path(folder)
        form = ShardForm(folder, self._folder, settings.seq_len, settings.rows_per_shard, self._dtype.str, marks.eos)
        self.splits = {split: SplitStream(form, split, base.splits[split] if base else None) for split in SPLITS}
        self._settings, self._parts = settings, parts
        self._known = DigestSet() if settings.dedup else None
        if self._known and base:
            _add_known(self._known, folder, base)
        self._next = 0  # next part to tokenize
        self._appended = 0  # parts 0 .. appended - 1 are in the streams
        self._waiting: dict[int, TokenizedPart] = {}
        self._last_file = ("", 0)  # last file of the appended parts: path, lines so far
        self._skipped = self._copies = 0

    def run(self, pool: ThisProcess | Workers, progress: Callable[[int, int, int], None], workers: int) -> None:
        """Run the build to its end."""
        self._find_tokenized(progress)
        while True:
            self._append_ready()
            while pool.is_free and (task := self._next_task(workers)):
                pool.start(task)
            if all(stream.is_written for stream in self.splits.values()):
                return
            for message in pool.receive():
                if isinstance(message, TokenizedCounts):
                    progress(*message)
                elif isinstance(message, TokenizedPart):
                    self._waiting[message.number] = message
                elif isinstance(message, WrittenShard):
                    self.splits[message.split].take(message)

    def report(self, name: str) -> None:
        """Log how many documents were left out."""
        if self._skipped:
            logger.info("source %s: %d empty or malformed documents left out", name, self._skipped)
        if self._known:
            logger.info("source %s: %d duplicate documents left out", name, self._copies)

    def _find_tokenized(self, progress: Callable[[int, int, int], None]) -> None:
        for number, pieces in enumerate(self._parts):
            if part := read_part(self._folder, number, self._dtype):
                self._waiting[number] = part
                progress(0, 0, sum(piece.size for piece in pieces))

    def _next_task(self, workers: int) -> WriteShard | TokenizePart | None:
        for stream in self.splits.values():  # shards first, because their parts' ids can then be deleted
            if task := stream.next_task():
                return task
        while self._next in self._waiting or self._next < self._appended:
            self._next += 1
        if self._next == len(self._parts) or self._next > self._appended + PARTS_AHEAD * workers:
            return None
        number, s = self._next, self._settings
        self._next += 1
        return TokenizePart(
            self._folder, number, self._parts[number],
            s.tokenizer_path, s.validation_fraction, s.document_chars, s.skip_bad,
        )  # fmt: skip

    def _append_ready(self) -> None:
        while part := self._waiting.pop(self._appended, None):
            self._append(part)
            self._appended += 1
        if self._appended == len(self._parts):
            for stream in self.splits.values():
                stream.end()

    def _append(self, part: TokenizedPart) -> None:
        documents, ids = list(part.documents), list(part.ids)
        copies = np.empty(0, np.int64)
        if self._known:
            records = np.load(documents_path(self._folder, part.number))
            copies = self._known.add(records["digest"])
            for split in (0, 1):
                dropped = records[copies]["length"][records[copies]["validation"] == split]
                documents[split] -= len(dropped)
                ids[split] -= int(dropped.sum())
        files = self._files(part)
        for i, stream in enumerate(self.splits.values()):
            stream.add(Span(part.number, stream.ids, ids[i], copies, files), documents[i])
        self._copies += len(copies)
        self._skipped += part.skipped

    def _files(self, part: TokenizedPart) -> tuple[tuple[str, int], ...]:
        files = []
        for piece, lines in zip(self._parts[part.number], part.lines, strict=True):
            path, before = self._last_file
            before = before if path == piece.path else 0
            files.append((piece.path, before))
            self._last_file = (piece.path, before + lines)
        return tuple(files)


def _check(name: str, settings: _Settings, overwrite: bool, append: bool) -> None:
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise UserError(f"source name '{name}' is not a plain folder name; use letters, digits, '-' and '_'")
    if min(settings.seq_len, settings.rows_per_shard) < 1:
        raise UserError(
            f"seq_len = {settings.seq_len} and rows per shard = {settings.rows_per_shard} must both be at least 1"
        )
    if not 0 <= settings.validation_fraction < 1:
        raise UserError(f"validation fraction {settings.validation_fraction} is not in [0, 1); use for example 0.01")
    if overwrite and append:
        raise UserError("--overwrite deletes the finished source and --append adds to it; choose one")


def _flags(settings: _Settings, tokenizer: Tokenizer) -> dict[str, object]:
    return {
        "seq_len": settings.seq_len,
        "rows per shard": settings.rows_per_shard,
        "validation fraction": settings.validation_fraction,
        "document chars": settings.document_chars,
        "dedup": settings.dedup,
        "tokenizer": tokenizer.sha256,
        build_folder.APPENDS_TO: "",
    }


def _base(folder: str, settings: _Settings, tokenizer: Tokenizer, overwrite: bool, append: bool) -> Manifest | None:
    """Return the manifest to append to, or None for a new source."""
    content = build_folder.finished(folder)
    if not append:
        if content is not None and not overwrite:
            raise UserError(
                f"{folder}: already holds a finished source; use another --out or name, --append to add to it, or "
                "--overwrite to replace it"
            )
        return None
    if content is None:
        raise UserError(f"{folder}: has no finished source to append to; build it first, without --append")
    base = parse_manifest(content, folder)
    check_tokenizer(base, tokenizer)
    for flag, is_, was in (
        ("--seq-len", settings.seq_len, base.seq_len),
        ("--rows-per-shard", settings.rows_per_shard, base.splits["train"].rows_per_shard),
        ("--validation-fraction", settings.validation_fraction, base.validation_fraction),
    ):
        if is_ != was:
            raise UserError(f"{folder}: was built with {flag} {was}, not {is_}; append with the same value")
    return base


def _add_known(known: DigestSet, folder: str, base: Manifest) -> None:
    for split in SPLITS:
        for shard in range(base.splits[split].shards):
            path = os.path.join(folder, documents_name(split, shard))
            try:
                with open(path, "rb") as file:
                    content = file.read()
            except FileNotFoundError:
                raise UserError(f"{path}: --dedup needs it, but it is missing; restore it, or {REBUILD}") from None
            known.add(np.array([document.digest for document in parse_documents(content, path)], DIGEST))


def _check_filled(folder: str, pattern: str, splits: dict[str, SplitStream], validation_fraction: float) -> None:
    total = sum(stream.documents for stream in splits.values())
    for name in SPLITS if validation_fraction else SPLITS[:1]:
        if not splits[name].documents:
            build_folder.discard(folder)
            raise UserError(
                f"{pattern}: the {name} split got 0 of {total} documents; use more text, another --validation-fraction "
                f"(now {validation_fraction:g}), or cut long documents with --document-chars 4000"
            )
