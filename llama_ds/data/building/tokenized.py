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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import BinaryIO, NamedTuple

import numpy as np

from llama_ds.data.building.atomic_file import atomic_writer
from llama_ds.data.building.dedup import DIGEST
from llama_ds.data.building.packing import id_dtype
from llama_ds.data.building.parts import Part
from llama_ds.data.source.manifest import SPLITS
from llama_ds.data.text.corpus import cut
from llama_ds.data.text.piece_reader import PieceReader, empty_file
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

REPORT_CHARS = 1 << 19  # characters of text between two progress reports, which also write the ids

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
    skipped: int  # documents left out


@dataclass(frozen=True)
class TokenizePart:
    """Task that tokenizes a part into the folder `build`."""

    build: str
    number: int
    pieces: Part
    tokenizer_path: str
    validation_fraction: float
    document_chars: int
    skip_bad: bool

    def run(self) -> Iterator[TokenizedCounts | TokenizedPart]:
        """Write the files of the part; yield progress, then the part's counts.

        Raises:
            UserError: bad input, or a full disk.
        """
        size = sum(piece.size for piece in self.pieces)
        with ExitStack() as stack:
            files = [
                stack.enter_context(atomic_writer(ids_path(self.build, self.number, s), size, False)) for s in SPLITS
            ]
            output = _Output(_tokenizer(self.tokenizer_path), files)
            lines, reported = [], 0
            for index, piece in enumerate(self.pieces):
                reader = PieceReader(piece, self.skip_bad)
                before = sum(p.size for p in self.pieces[:index])
                for line, text in reader:
                    self._check_not_empty(reader, line, text)
                    self._add(output, index, line, text)
                    if output.chars >= REPORT_CHARS:
                        done = before + int(reader.share * piece.size)
                        yield output.flush(max(0, done - reported))
                        reported = max(reported, done)
                lines.append(reader.lines)
                output.skipped += reader.skipped
            yield output.flush(size - reported)
        yield self._finish(output, tuple(lines))

    def _check_not_empty(self, reader: PieceReader, line: int, text: str) -> None:
        if text or self.skip_bad:
            return
        if not line and not os.path.getsize(reader.piece.path):
            raise UserError(f"{empty_file(reader.piece.path)}, or leave such documents out with --skip-bad")
        raise UserError(f"{reader.where(line)}: empty document; remove it, or leave such documents out with --skip-bad")

    def _add(self, output: _Output, piece: int, line: int, text: str) -> None:
        output.skipped += not text
        for document in cut(text, self.document_chars):
            output.add(document, piece, line, self.validation_fraction)

    def _finish(self, output: _Output, lines: tuple[int, ...]) -> TokenizedPart:
        records = output.records()
        with atomic_writer(documents_path(self.build, self.number), records.nbytes, wait=False) as file:
            np.save(file, records)
        held_out = int(records["validation"].sum())
        part = TokenizedPart(self.number, (len(records) - held_out, held_out), output.totals(), lines, output.skipped)
        with atomic_writer(_record_path(self.build, self.number), wait=False) as file:
            file.write(json.dumps(asdict(part)).encode())
        return part


class _Output:
    """Tokenizes documents, and writes their ids to the file of their split."""

    def __init__(self, tokenizer: Tokenizer, files: Sequence[BinaryIO]) -> None:
        self._tokenizer, self._files = tokenizer, files
        self._dtype = id_dtype(tokenizer.vocab_size)
        marks = tokenizer.marks
        self._begin = np.array([] if marks.begin is None else [marks.begin], self._dtype)
        self._end = np.array([marks.eos], self._dtype)
        self._ids: list[list[np.ndarray]] = [[] for _ in files]
        self._written = [0 for _ in files]
        self._lengths, self._lines, self._pieces = array("q"), array("q"), array("i")
        self._validation, self._digests = bytearray(), bytearray()
        self._reported = (0, 0)  # documents, ids
        self.chars = self.skipped = 0

    def add(self, text: str, piece: int, line: int, validation_fraction: float) -> None:
        """Tokenize one document."""
        digest = hashlib.sha256(text.encode()).digest()
        split = _is_validation(digest, validation_fraction)
        ids = self._tokenizer.encode_array(text).astype(self._dtype, copy=False)
        self._ids[split] += (self._begin, ids, self._end)
        self._lengths.append(len(self._begin) + len(ids) + len(self._end))
        self._lines.append(line)
        self._pieces.append(piece)
        self._validation.append(split)
        self._digests += digest[: DIGEST.itemsize]
        self.chars += len(text)

    def flush(self, read_bytes: int) -> TokenizedCounts:
        """Write the buffered ids, and return the progress since the last call."""
        for i, (ids, file) in enumerate(zip(self._ids, self._files, strict=True)):
            if ids:
                file.write(np.concatenate(ids).data)
            self._written[i] += sum(map(len, ids))
            ids.clear()
        documents, ids_ = self._reported
        self._reported = len(self._lengths), sum(self._written)
        self.chars = 0
        return TokenizedCounts(self._reported[0] - documents, self._reported[1] - ids_, read_bytes)

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
    return _is_validation(hashlib.sha256(text.encode()).digest(), fraction)


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
    return TokenizedPart(raw["number"], tuple(raw["documents"]), tuple(raw["ids"]), tuple(raw["lines"]), raw["skipped"])


def _record_path(build: str, number: int) -> str:
    return os.path.join(build, f"part-{number:06d}.json")


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
