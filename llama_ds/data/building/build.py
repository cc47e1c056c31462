"""Building a source: documents -> ids -> packed rows -> webdataset tar shards and a manifest.

The input is divided into parts (parts.py). Worker processes tokenize parts (tokenized.py) in any order. This module
puts them in order, optionally deduplicates them, and starts a task to write each shard (shard_writer.py) as soon as all
its ids exist. Every file is written atomically, so a build may be killed at any moment and is resumable.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llama_ds.data.building import build_folder
from llama_ds.data.building.dedup import DIGEST, DigestSet
from llama_ds.data.building.document_counts import DocumentCounts
from llama_ds.data.building.found_input import FoundInput, find_input
from llama_ds.data.building.input_files import (
    InputFile,
    build_input,
    check_touched,
    missing_files,
)
from llama_ds.data.building.packing import id_dtype
from llama_ds.data.building.parts import plan_parts
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
from llama_ds.data.building.workers import WorkerPool
from llama_ds.data.building.workers import workers as start_workers
from llama_ds.data.building.write_errors import reporting_write_errors
from llama_ds.data.source.documents_index import parse_documents
from llama_ds.data.source.input_index import ListedFile
from llama_ds.data.source.manifest import REBUILD, SPLITS, Manifest, check_tokenizer, documents_name, parse_manifest
from llama_ds.data.text.formats import FileFormat, ReadOptions
from llama_ds.data.text.inputs import Inputs, TakenFile
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
    options: ReadOptions
    allow_empty: tuple[str, ...]


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
    options: ReadOptions | None = None,
    allow_empty: tuple[str, ...] = (),
    announce: Callable[[int], None] = lambda input_bytes: None,
    start_pool: Callable[[int], WorkerPool] = start_workers,
    found: FoundInput | None = None,
) -> Manifest:
    """Tokenize and pack the documents of `pattern` into the folder out/name.

    The hash of a document's text assigns it to a split: copies of a text go to the same split, and adding documents
    moves none. `dedup` keeps only the first of equal documents. `append` adds the documents to a finished source,
    whose shards stay unchanged; files that it already holds are left out. `skip_bad` leaves out documents that are
    empty, not UTF-8 or not JSON, and reports them by file and reason; a list of documents of which none is left is an
    error unless it matches `allow_empty`. A build or addition that is already complete is not repeated.

    Args:
        pattern: a file, a folder or a glob with `**`.
        seq_len: tokens per row; a row holds one id more, the last label.
        validation_fraction: fraction of the documents held out for validation.
        workers: number of processes that tokenize and write.
        document_chars: longer documents are cut at line ends; 0: no document is cut.
        overwrite: delete an existing finished source, or an unfinished build of other documents or flags.
        options: how the files are found and read.
        allow_empty: patterns of files that may be empty or yield no document.
        announce: called once with the size of the input in bytes.
        start_pool: starts the processes for `workers`; by default on this machine.
        found: what `find_input` has found for the pattern and the options, if it was called before.

    The bytes written depend on the documents, the tokenizer and the sizes, but not on `workers` or on restarts of the
    build. `progress` is called with the documents, ids and input bytes processed since its last call, and with
    (0, 0, bytes) for the work of an earlier, killed build and for files that the source holds.

    Raises:
        UserError: the source exists, a document is bad (see `documents`), a split is empty, or the disk is full.
    """
    settings = _Settings(
        tokenizer_path, seq_len, validation_fraction, rows_per_shard, document_chars, dedup, skip_bad,
        options or ReadOptions(), allow_empty,
    )  # fmt: skip
    _check(name, settings, workers, overwrite, append)
    tokenizer = Tokenizer(tokenizer_path)
    keep_loaded(tokenizer)
    folder = os.path.join(out, name)
    found = found.current() if found else find_input(pattern, settings.options)
    inputs, files = found.inputs, found.files
    inputs.report()
    with reporting_write_errors(folder), build_folder.locked(folder):
        build_folder.finish_commit(folder)
        base = None if overwrite else _finished(folder, settings, tokenizer, append)
        if base is not None:
            size = sum(file.size for file in files)
            files = missing_files(folder, base, files, _reading_flags(settings), append, workers)
            if held := size - sum(file.size for file in files):
                progress(0, 0, held)
            if not files:
                logger.info("%s: already holds all documents of %s; nothing is left to do", folder, pattern)
                return base
        return _complete(
            folder, name, inputs, settings, tokenizer, files, base, overwrite,
            lambda: start_pool(workers), progress, announce,
        )  # fmt: skip


def _complete(
    folder: str,
    name: str,
    inputs: Inputs,
    settings: _Settings,
    tokenizer: Tokenizer,
    files: Sequence[InputFile],
    base: Manifest | None,
    overwrite: bool,
    start: Callable[[], WorkerPool],
    progress: Callable[[int, int, int], None],
    announce: Callable[[int], None],
) -> Manifest:
    """Build the documents of `files`, some of `inputs`, resuming an unfinished build of them."""
    mark = build_folder.fingerprint(files, _flags(settings, tokenizer))
    if base is not None:
        mark[build_folder.APPENDS_TO] = hashlib.sha256(build_folder.finished(folder) or b"").hexdigest()
    found = build_folder.begin(folder, mark, files, base, overwrite)
    build = _Build(folder, settings, tokenizer, files, inputs.formats, base)
    announce(build.input_bytes)
    build.resume(found, progress)
    try:
        with start() as pool:
            build.run(pool, progress)
    finally:
        build_folder.remove_temporary(folder)  # also on an error, because the disk may be full
    if base is None:
        _check_filled(folder, inputs.pattern, build.splits, settings.validation_fraction)
    listed = build.listed_files()
    entry = build_input(listed, base is not None, _reading_flags(settings))
    manifest = Manifest(
        name, settings.seq_len, tokenizer.vocab_size, id_dtype(tokenizer.vocab_size).str, tokenizer.sha256,
        settings.validation_fraction, {split: stream.result() for split, stream in build.splits.items()},
        inputs=(*(base.inputs if base else ()), entry),
    )  # fmt: skip
    build_folder.commit(folder, manifest, base, {split: s.sha256 for split, s in build.splits.items()}, listed)
    build.report(name)
    return manifest


class _Build:
    """Schedules the tasks of a build, and appends tokenized parts to the split streams in order."""

    def __init__(
        self,
        folder: str,
        settings: _Settings,
        tokenizer: Tokenizer,
        files: Sequence[InputFile],
        formats: Mapping[str, FileFormat],
        base: Manifest | None,
    ) -> None:
        self._dtype = id_dtype(tokenizer.vocab_size)
        self._source, self._folder = folder, build_folder.build_path(folder)
        form = ShardForm(
            folder, self._folder, settings.seq_len, settings.rows_per_shard, self._dtype.str, tokenizer.marks.eos
        )
        self.splits = {split: SplitStream(form, split, base.splits[split] if base else None) for split in SPLITS}
        self._settings, self._inputs = settings, {file.path: file for file in files}
        self._parts = plan_parts([TakenFile(file.path, formats[file.path]) for file in files], settings.options)
        self.input_bytes = sum(piece.size for part in self._parts for piece in part)
        self._first_part: dict[str, int] = {}  # number of the part in which each file begins
        for number, pieces in enumerate(self._parts):
            for piece in pieces:
                self._first_part.setdefault(piece.path, number)
        self._digests: dict[str, str] = {}
        self._known = DigestSet() if settings.dedup else None
        if self._known and base:
            _add_known(self._known, folder, base)
        self._next = 0  # next part to tokenize
        self._appended = 0  # parts 0 .. appended - 1 are in the streams
        self._waiting: dict[int, TokenizedPart] = {}
        self._counts = DocumentCounts(settings.options, settings.allow_empty)
        self._copies = 0

    def resume(self, found: Sequence[InputFile], progress: Callable[[int, int, int], None]) -> None:
        """Take over what an earlier, killed build finished; `found` are the files as that build found them.

        Raises:
            UserError: a file that it has read has changed.
        """
        read: set[str] = set()
        for number, pieces in enumerate(self._parts):
            if part := read_part(self._folder, number, self._dtype):
                self._waiting[number] = part
                self._digests.update(part.digests)
                read.update(piece.path for piece in pieces)
                progress(0, 0, sum(piece.size for piece in pieces))
        now = list(self._inputs.values())
        if found != now:
            check_touched(found, now, self._digests, read, self._folder)
            build_folder.save_files(self._source, now)

    def run(self, pool: WorkerPool, progress: Callable[[int, int, int], None]) -> None:
        """Run the build to its end."""
        while True:
            self._append_ready()
            while pool.is_free and (task := self._next_task(pool.size)):
                pool.start(task)
            if all(stream.is_written for stream in self.splits.values()):
                return
            for message in pool.receive():
                if isinstance(message, TokenizedCounts):
                    progress(*message)
                elif isinstance(message, TokenizedPart):
                    self._waiting[message.number] = message
                    self._digests.update(message.digests)
                elif isinstance(message, WrittenShard):
                    self.splits[message.split].take(message)

    def listed_files(self) -> list[ListedFile]:
        """Return the input files with their checksums, once all parts are tokenized."""
        return [ListedFile(self._digests[path], file.size, path) for path, file in self._inputs.items()]

    def report(self, name: str) -> None:
        """Log how many documents were left out."""
        self._counts.report(name)
        if self._known:
            logger.info("source %s: %d duplicate documents left out", name, self._copies)

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
        paths = dict.fromkeys(piece.path for piece in self._parts[number])
        return TokenizePart(
            self._folder, number, self._parts[number], tuple(self._inputs[path] for path in paths),
            tuple(path for path in paths if self._first_part[path] == number),
            s.tokenizer_path, s.validation_fraction, s.document_chars, s.skip_bad, s.options, s.allow_empty,
        )  # fmt: skip

    def _append_ready(self) -> None:
        while part := self._waiting.pop(self._appended, None):
            self._append(part)
            self._appended += 1
        if self._appended == len(self._parts):
            self._counts.end_file()
            for stream in self.splits.values():
                stream.end()

    def _append(self, part: TokenizedPart) -> None:
        files = self._counts.add(self._parts[part.number], part)
        documents, ids = list(part.documents), list(part.ids)
        copies = np.empty(0, np.int64)
        if self._known:
            records = np.load(documents_path(self._folder, part.number))
            copies = self._known.add(records["digest"])
            for split in (0, 1):
                dropped = records[copies]["length"][records[copies]["validation"] == split]
                documents[split] -= len(dropped)
                ids[split] -= int(dropped.sum())
        for i, stream in enumerate(self.splits.values()):
            stream.add(Span(part.number, stream.ids, ids[i], copies, files), documents[i])
        self._copies += len(copies)


def _check(name: str, settings: _Settings, workers: int, overwrite: bool, append: bool) -> None:
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise UserError(f"source name '{name}' is not a plain folder name; use letters, digits, '-' and '_'")
    if min(settings.seq_len, settings.rows_per_shard) < 1:
        raise UserError(
            f"seq_len = {settings.seq_len} and rows per shard = {settings.rows_per_shard} must both be at least 1"
        )
    if workers < 1:
        raise UserError(f"workers = {workers} is not positive; use 1 or more processes")
    if settings.document_chars < 0:
        raise UserError(f"document chars = {settings.document_chars} is negative; use 0 to split no document")
    if not 0 <= settings.validation_fraction < 1:
        raise UserError(f"validation fraction {settings.validation_fraction} is not in [0, 1); use for example 0.01")
    if overwrite and append:
        raise UserError("--overwrite deletes the finished source and --append adds to it; choose one")


def _flags(settings: _Settings, tokenizer: Tokenizer) -> dict[str, object]:
    """Return the flags on which the bytes of a build depend."""
    return {
        "seq_len": settings.seq_len,
        "rows per shard": settings.rows_per_shard,
        "validation fraction": settings.validation_fraction,
        "tokenizer": tokenizer.sha256,
        **_reading_flags(settings),
        build_folder.APPENDS_TO: "",
    }


def _reading_flags(settings: _Settings) -> dict[str, object]:
    """Return the flags that decide which documents the input gives; those of a manifest's shape are fields there."""
    return {"document chars": settings.document_chars, "dedup": settings.dedup, **settings.options.flags()}


def _finished(folder: str, settings: _Settings, tokenizer: Tokenizer, append: bool) -> Manifest | None:
    """Return the manifest of the finished source in a folder, None if there is none.

    Raises:
        UserError: it was built with another tokenizer or other sizes, or `append` needs one and there is none.
    """
    content = build_folder.finished(folder)
    if content is None:
        if append:
            raise UserError(f"{folder}: has no finished source to append to; build it first, without --append")
        return None
    base = parse_manifest(content, folder)
    advice = (
        "append with the same value"
        if append
        else "use another --out or name for a second source, or --overwrite to replace this one"
    )
    if not append and base.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(f"{folder}: already holds a finished source, built with another tokenizer; {advice}")
    check_tokenizer(base, tokenizer)
    for flag, is_, was in (
        ("--seq-len", settings.seq_len, base.seq_len),
        ("--rows-per-shard", settings.rows_per_shard, base.splits["train"].rows_per_shard),
        ("--validation-fraction", settings.validation_fraction, base.validation_fraction),
    ):
        if is_ != was:
            raise UserError(f"{folder}: was built with {flag} {was}, not {is_}; {advice}")
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
