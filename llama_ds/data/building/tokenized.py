"""Tokenizing a part of the input, and the files that store its ids until the shards are written.

    part-000000.train.ids, part-000000.validation.ids   concatenated ids of its documents
    part-000000.documents.npy                           one record per document, in order
    part-000000.json                                    counts; written last, it marks the part as finished

The files are not synced to disk, which would slow down small parts; a restart checks their sizes instead.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import BinaryIO, NamedTuple

import numpy as np

from llama_ds.data.building.dedup import DIGEST
from llama_ds.data.building.imported_ids import ImportedIds
from llama_ds.data.building.input_files import InputFile, check_unchanged, digest
from llama_ds.data.building.packing import id_dtype
from llama_ds.data.building.parts import Part
from llama_ds.data.building.write_errors import atomic_writer
from llama_ds.data.source.manifest import SPLITS
from llama_ds.data.text.corpus import cut
from llama_ds.data.text.cuts import PIECE_CHARS, pieces_of
from llama_ds.data.text.formats import MEGATRON, ReadOptions, matches
from llama_ds.data.text.input_storage import input_size
from llama_ds.data.text.piece_reader import EMPTY_DOCUMENT, LeftOut, PieceReader, TextPiece, empty_file
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

REPORT_CHARS = 1 << 19  # characters of text between two progress reports, which also write the ids
NOT_ENCODED = "the tokenizer cannot encode it"
BATCH_CHARS = 1 << 17  # characters encoded in a row, because other work evicts the encoder's tables from the caches

DOCUMENT = np.dtype(
    [("length", "<i8"), ("line", "<i8"), ("piece", "<i4"), ("validation", "?"), ("digest", DIGEST)]
)  # line: counted from the start of the piece; 0 if the file is one document


class TokenizedCounts(NamedTuple):
    """Progress since the last report; `bytes` counts the input."""

    documents: int
    ids: int
    bytes: int


@dataclass(frozen=True)
class TokenizedPart:
    """Counts of a finished part; pairs are (train, validation)."""

    number: int
    documents: tuple[int, int]
    ids: tuple[int, int]
    lines: tuple[int, ...]  # number of lines of each piece
    taken: tuple[int, ...]  # number of documents read from each piece, before they are cut
    left_out: tuple[dict[str, LeftOut], ...]  # documents of each piece that were left out, by reason
    digests: dict[str, str]  # sha256 of each file that the task was asked to hash, by path


@dataclass(frozen=True)
class TokenizePart:
    """Task that tokenizes a part into the folder `build`."""

    build: str
    number: int
    pieces: Part
    files: tuple[InputFile, ...]  # files of the pieces, as the build found them
    hashed: tuple[str, ...]  # paths of those that begin in this part
    tokenizer_path: str
    validation_fraction: float
    document_chars: int
    skip_bad: bool
    options: ReadOptions
    allow_empty: tuple[str, ...]

    def run(self) -> Iterator[TokenizedCounts | TokenizedPart]:
        """Write the files of the part; yield progress, then the part's counts.

        Raises:
            UserError: bad input, input that changed since the build found it, or a full disk.
        """
        check_unchanged(self.files)
        digests = {path: digest(path) for path in self.hashed}  # first, so that small files are then in the page cache
        try:
            lines, output = yield from self._tokenize()
        except UserError:
            check_unchanged(self.files)  # the reason of any other error
            raise
        check_unchanged(self.files)
        yield self._finish(output, lines, digests)

    def _tokenize(self) -> Generator[TokenizedCounts, None, tuple[tuple[int, ...], _Output]]:
        size = sum(piece.size for piece in self.pieces)
        with ExitStack() as stack:
            files = [
                stack.enter_context(atomic_writer(ids_path(self.build, self.number, s), size, False)) for s in SPLITS
            ]
            output = _Output(_tokenizer(self.tokenizer_path), files, self.validation_fraction, self.skip_bad)
            lines, reported = [], 0
            for index, piece in enumerate(self.pieces):
                reader = self._reader(piece, output)
                before = sum(p.size for p in self.pieces[:index])
                output.begin_piece(index, reader)
                for _ in self._documents(output, reader):
                    if output.chars >= REPORT_CHARS:
                        done = before + int(reader.share * piece.size)
                        yield output.flush(max(0, done - reported))
                        reported = max(reported, done)
                output.encode_waiting()
                lines.append(reader.lines)
                output.left_out.append(reader.left_out)
            yield output.flush(size - reported)
        return tuple(lines), output

    def _reader(self, piece: TextPiece, output: _Output) -> PieceReader | ImportedIds:
        if piece.format is not None and piece.format.content == MEGATRON:
            return ImportedIds(piece, output.tokenizer, self.skip_bad)
        return PieceReader(piece, self.skip_bad, self.options)

    def _documents(self, output: _Output, reader: PieceReader | ImportedIds) -> Iterator[None]:
        """Add the documents of a piece, and yield after each."""
        if isinstance(reader, PieceReader):
            for line, text in self._texts(reader):
                self._add(output, reader, line, text)
                yield
        elif self.document_chars:
            raise UserError(f"{reader.piece.path}: --document-chars splits no ids already made; omit it")
        else:
            for line, ids, text in reader:
                output.taken[-1] += 1
                output.add_ids(ids, text, line)
                yield

    def _texts(self, reader: PieceReader) -> Iterable[tuple[int, str]]:
        """Return the texts of a piece, none for an empty file that is allowed."""
        path = reader.piece.path
        if input_size(path):
            return reader
        if matches(path, self.allow_empty):
            reader.leave_out("empty file", 0)
            return ()
        if self.skip_bad and not reader.is_list:
            return reader
        fix = (
            f"accept this file with --allow-empty '{path}'" if reader.is_list else "skip such documents with --skip-bad"
        )
        raise UserError(f"{empty_file(path)}, or {fix}")

    def _check_not_empty(self, reader: PieceReader, line: int) -> None:
        if self.skip_bad:
            reader.leave_out(EMPTY_DOCUMENT, line)
        else:
            raise UserError(
                f"{reader.where(line)}: empty document; remove it, or leave such documents out with --skip-bad"
            )

    def _add(self, output: _Output, reader: PieceReader, line: int, text: str) -> None:
        if not text:
            self._check_not_empty(reader, line)
            return
        output.taken[-1] += 1
        for document in cut(text, self.document_chars):
            output.add(document, line)

    def _finish(self, output: _Output, lines: tuple[int, ...], digests: dict[str, str]) -> TokenizedPart:
        records = output.records()
        with atomic_writer(documents_path(self.build, self.number), records.nbytes, wait=False) as file:
            np.save(file, records)
        held_out = int(records["validation"].sum())
        documents = len(records) - held_out, held_out
        part = TokenizedPart(
            self.number, documents, output.totals(), lines, tuple(output.taken), tuple(output.left_out), digests
        )
        with atomic_writer(_record_path(self.build, self.number), wait=False) as file:
            file.write(json.dumps(asdict(part)).encode())
        return part


class _Output:
    """Tokenizes documents, and writes their ids to the file of their split."""

    def __init__(
        self, tokenizer: Tokenizer, files: Sequence[BinaryIO], validation_fraction: float, skip_bad: bool
    ) -> None:
        self.tokenizer, self._files, self._validation_fraction = tokenizer, files, validation_fraction
        self._skip_bad = skip_bad
        self._failed = -1, -1  # piece and line of the last document that could not be encoded
        self._dtype = id_dtype(tokenizer.vocab_size)
        marks = tokenizer.marks
        self._begin = np.array([] if marks.begin is None else [marks.begin], self._dtype)
        self._end = np.array([marks.eos], self._dtype)
        self._marks = len(self._begin) + len(self._end)
        self._waiting: list[tuple[str, int]] = []  # texts of the piece that are not encoded yet, with their lines
        self._waiting_chars = 0
        self._ids: list[list[np.ndarray]] = [[] for _ in files]
        self._written = [0 for _ in files]
        self._lengths, self._lines, self._pieces = array("q"), array("q"), array("i")
        self._validation, self._digests = bytearray(), bytearray()
        self._reported = (0, 0)  # documents, ids
        self.taken: list[int] = []  # documents of each piece
        self.left_out: list[dict[str, LeftOut]] = []
        self.chars = 0

    def begin_piece(self, piece: int, reader: PieceReader | ImportedIds) -> None:
        """Begin with the documents of a piece."""
        self._piece, self._reader = piece, reader
        self.taken.append(0)

    def add_ids(self, ids: np.ndarray, text: str, line: int) -> None:
        """Add one document whose ids are known."""
        split = self._record(_digest(text), line, self._marks + len(ids))
        self._ids[split] += (self._begin, ids.astype(self._dtype), self._end)
        self.chars += len(text)

    def add(self, text: str, line: int) -> None:
        """Tokenize one document, together with the next if it is short."""
        self.chars += len(text)
        if len(text) > PIECE_CHARS:
            self.encode_waiting()
            self._add_long(text, line)
            return
        self._waiting.append((text, line))
        self._waiting_chars += len(text)
        if self._waiting_chars >= BATCH_CHARS:
            self.encode_waiting()

    def encode_waiting(self) -> None:
        """Tokenize the documents that wait."""
        encoded = [self._encode(text, line) for text, line in self._waiting]
        for (text, line), ids in zip(self._waiting, encoded, strict=True):  # hashed now, because str keeps its UTF-8
            if ids is None:
                continue
            split = self._record(_digest(text), line, self._marks + len(ids))
            self._ids[split] += (self._begin, ids, self._end)
        self._waiting, self._waiting_chars = [], 0

    def _add_long(self, text: str, line: int) -> None:
        """Tokenize a document in pieces, and write the ids of each."""
        digest = _digest(text)
        split = _is_validation(digest, self._validation_fraction)
        self._write()
        start, length = self._written[split], self._marks
        self._ids[split].append(self._begin)
        for part in pieces_of(text, self.tokenizer.cuts):
            ids = self._encode(part, line)
            if ids is None:
                self._take_back(split, start)
                return
            length += len(ids)
            self._ids[split].append(ids)
            self._write()
        self._ids[split].append(self._end)
        self._record(digest, line, length)

    def _take_back(self, split: int, start: int) -> None:
        """Remove the ids of a document that has begun at id `start` of its split."""
        self._ids[split].clear()
        self._files[split].seek(start * self._dtype.itemsize)
        self._files[split].truncate()
        self._written[split] = start

    def _encode(self, text: str, line: int) -> np.ndarray | None:
        """Return the ids of a text; None if the tokenizer cannot encode it and the document is left out."""
        try:
            return self.tokenizer.encode_array(text).astype(self._dtype, copy=False)
        except UserError as error:
            if not (self._skip_bad and isinstance(self._reader, PieceReader)):
                hint = ", or leave such documents out with --skip-bad"
                raise UserError(f"{self._reader.where(line)}: {error}{hint}") from None
        if self._failed != (self._piece, line):  # once for the pieces of a document
            self._failed = self._piece, line
            self._reader.leave_out(NOT_ENCODED, line)
            self.taken[-1] -= 1
        return None

    def _record(self, digest: bytes, line: int, length: int) -> bool:
        """Record a document; return whether it belongs to validation."""
        split = _is_validation(digest, self._validation_fraction)
        self._lengths.append(length)
        self._lines.append(line)
        self._pieces.append(self._piece)
        self._validation.append(split)
        self._digests += digest[: DIGEST.itemsize]
        return split

    def flush(self, read_bytes: int) -> TokenizedCounts:
        """Write the ids so far, and return the progress since the last call."""
        self.encode_waiting()
        self._write()
        documents, ids = self._reported
        self._reported = len(self._lengths), sum(self._written)
        self.chars = 0
        return TokenizedCounts(self._reported[0] - documents, self._reported[1] - ids, read_bytes)

    def _write(self) -> None:
        for i, (ids, file) in enumerate(zip(self._ids, self._files, strict=True)):
            if ids:
                joined = np.concatenate(ids)
                file.write(joined.data)
                self._written[i] += len(joined)
                ids.clear()

    def totals(self) -> tuple[int, int]:
        """Return the number of ids written for each split."""
        return self._written[0], self._written[1]

    def records(self) -> np.ndarray:
        """Return one record per document."""
        records = np.empty(len(self._lengths), DOCUMENT)
        records["length"], records["line"], records["piece"] = self._lengths, self._lines, self._pieces
        records["validation"] = np.frombuffer(self._validation, np.bool_)
        records["digest"] = np.frombuffer(self._digests, DIGEST)
        return records


def in_validation(text: str, fraction: float) -> bool:
    """Whether the hash of a text assigns it to validation."""
    return _is_validation(_digest(text), fraction)


def ids_path(build: str, number: int, split: str) -> str:
    """Return the path of a part's ids of a split."""
    return os.path.join(build, f"part-{number:06d}.{split}.ids")


def documents_path(build: str, number: int) -> str:
    """Return the path of a part's document records."""
    return os.path.join(build, f"part-{number:06d}.documents.npy")


def read_part(build: str, number: int, dtype: np.dtype) -> TokenizedPart | None:
    """Return a part that an earlier, killed build finished, or None."""
    try:
        with open(_record_path(build, number), "rb") as file:
            raw = json.load(file)
        if os.path.getsize(documents_path(build, number)) < sum(raw["documents"]) * DOCUMENT.itemsize:
            return None
    except (FileNotFoundError, ValueError):
        return None
    for split, ids in zip(SPLITS, raw["ids"], strict=True):
        path = ids_path(build, number, split)  # missing once all its shards are written
        if os.path.exists(path) and os.path.getsize(path) != ids * dtype.itemsize:
            return None
    left_out = tuple({reason: LeftOut(**found) for reason, found in piece.items()} for piece in raw["left_out"])
    pairs = {key: tuple(raw[key]) for key in ("documents", "ids", "lines", "taken")}
    return TokenizedPart(**{**raw, **pairs, "left_out": left_out})


def _record_path(build: str, number: int) -> str:
    return os.path.join(build, f"part-{number:06d}.json")


def _digest(text: str) -> bytes:
    if len(text) <= PIECE_CHARS:
        return hashlib.sha256(text.encode()).digest()
    sha256 = hashlib.sha256()
    for start in range(0, len(text), PIECE_CHARS):  # in pieces, because the encoded text is a copy
        sha256.update(text[start : start + PIECE_CHARS].encode())
    return sha256.digest()


def _is_validation(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def keep_loaded(tokenizer: Tokenizer) -> None:
    """Let the tasks of this process use a tokenizer that is loaded already: a large one takes a second."""
    _loaded.clear()
    _loaded[tokenizer.path] = tokenizer


def _tokenizer(path: str) -> Tokenizer:
    if path not in _loaded:
        keep_loaded(Tokenizer(path))
    return _loaded[path]


_loaded: dict[str, Tokenizer] = {}  # by path
