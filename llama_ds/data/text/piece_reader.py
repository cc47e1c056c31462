"""Reading the texts of a file or of a piece of a file: JSON lines (plain, gzip, zstd), parquet, or one text.

Any process can read a piece without reading the file before it. Lines (parquet: rows) are counted from the start of the
piece; only an error message needs the line number in the file, and then the reader scans the file up to the piece.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from llama_ds.errors import UserError

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = ".parquet"
READ_BYTES = 1 << 16  # zstd bytes per read; small, because they may decompress to a thousand times as much
READ_BUFFER = 1 << 20  # bytes per system call; lines are long documents
BATCH_ROWS = 256  # parquet rows per batch


@dataclass(frozen=True)
class TextPiece:
    """A file or a piece of it, start .. stop - 1: a byte range of plain JSON lines, or row groups of a parquet file."""

    path: str
    start: int = 0
    stop: int | None = None  # None: the end of the file
    size: int = 0  # bytes of the file that the piece accounts for, for progress bars


class _BadDocument(Exception):
    """A malformed document, with the message of a UserError."""


class PieceReader:
    """Iterates over (line, text) of a piece; the line is 0 where the file is one text.

    `lines` counts the lines read so far; `share` is the fraction of the piece read so far. With `skip_bad`, documents
    that are binary, not UTF-8 or not JSON with a text are left out and counted in `skipped`. With None, the error
    message does not mention the option --skip-bad.

    Raises:
        UserError: the file is empty, binary, damaged or not UTF-8, or a line has no text; names file and line.
    """

    def __init__(self, piece: TextPiece, skip_bad: bool | None = None) -> None:
        self.piece = piece
        self.lines = self.skipped = 0
        self.share = 0.0
        self._skip_bad = skip_bad

    def __iter__(self) -> Iterator[tuple[int, str]]:
        path = self.piece.path.lower()
        if path.endswith(PARQUET):
            return self._parquet()
        if path.endswith(JSON_LINES):
            return self._json_lines()
        return self._one_text()

    def where(self, line: int) -> str:
        """Return file:line, with the line number in the file."""
        if not line:
            return self.piece.path
        return f"{self.piece.path}:{self._lines_before() + line}"

    def _one_text(self) -> Iterator[tuple[int, str]]:
        with _open(self.piece.path) as file:
            data = file.read()
        self.share = 1.0
        with self._skipping_bad():
            yield 0, _decode(data, self.piece.path).removeprefix("\ufeff")

    def _json_lines(self) -> Iterator[tuple[int, str]]:
        path = self.piece.path
        size = os.path.getsize(path) if os.path.exists(path) else 0
        with _open(path) as file:
            if size == 0:
                raise empty_file(path)
            if path.lower().endswith(".jsonl"):
                yield from self._texts(self._lines_of_range(file, size))
            else:
                lines = _gzip_lines(file) if path.lower().endswith(".gz") else _zstd_lines(file, path)
                yield from self._texts(self._lines_of_stream(file, size, lines))

    def _texts(self, lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, str]]:
        for offset, data in lines:
            self.lines += 1
            if data.isspace():
                continue
            with self._skipping_bad():
                yield self.lines, self._text_of(_decode(data, self.piece.path, offset))

    def _lines_of_range(self, file: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
        start, stop = self.piece.start, size if self.piece.stop is None else self.piece.stop
        offset = start
        if start:  # skip the rest of a line that starts in the piece before
            file.seek(start - 1)
            offset += len(file.readline()) - 1
        while offset < stop and (data := file.readline()):
            yield offset, data
            offset += len(data)
            self.share = min(1.0, (offset - start) / max(1, stop - start))

    def _lines_of_stream(self, file: BinaryIO, size: int, lines: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
        offset = 0
        try:
            for data in lines:
                yield offset, data
                offset += len(data)
                self.share = file.tell() / size
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self._damaged("gzip", error) from None

    def _parquet(self) -> Iterator[tuple[int, str]]:
        import pyarrow  # type: ignore[import-untyped]

        with open_parquet(self.piece.path) as file:
            stop = file.num_row_groups if self.piece.stop is None else self.piece.stop
            groups = range(self.piece.start, stop)
            rows = sum(file.metadata.row_group(group).num_rows for group in groups)
            try:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=["text"]):
                    for text in batch.column(0).to_pylist():
                        self.lines += 1
                        with self._skipping_bad():
                            yield self.lines, self._checked(text, "row of a parquet file")
                    self.share = self.lines / max(1, rows)
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise self._damaged("parquet", error) from None

    @contextmanager
    def _skipping_bad(self) -> Iterator[None]:
        try:
            yield
        except _BadDocument as error:
            if not self._skip_bad:
                hint = "" if self._skip_bad is None else ", or leave such documents out with --skip-bad"
                raise UserError(f"{error}{hint}") from None
            self.skipped += 1

    def _text_of(self, line: str) -> str:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            where = self.where(self.lines)
            raise _BadDocument(f"{where}: not JSON ({error}); every line of a .jsonl file is one JSON object") from None
        return self._checked(record.get("text") if isinstance(record, dict) else None, "line of a .jsonl file")

    def _checked(self, text: object, holder: str) -> str:
        if not isinstance(text, str):
            where = self.where(self.lines)
            raise _BadDocument(f'{where}: no "text" of type string; every {holder} has one: {{"text": "..."}}')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = self.where(self.lines)
            raise _BadDocument(
                f"{where}: character {error.start} is half of a surrogate pair; write it as UTF-8"
            ) from None
        return text

    def _lines_before(self) -> int:
        path, start = self.piece.path, self.piece.start
        if not start:
            return 0
        if path.lower().endswith(PARQUET):
            with open_parquet(path) as file:
                return sum(file.metadata.row_group(group).num_rows for group in range(start))
        with _open(path) as raw:  # lines starting before byte `start`: the first, and one per line end
            return 1 + sum(raw.read(min(1 << 20, start - 1 - at)).count(b"\n") for at in range(0, start - 1, 1 << 20))

    def _damaged(self, kind: str, error: Exception) -> UserError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return UserError(
            f"{self.piece.path}: damaged {kind} file after line {self.lines} ({reason}); fetch or write it again"
        )


def open_parquet(path: str) -> Any:
    """Open a parquet file that has a column "text".

    Raises:
        UserError: pyarrow is not installed, or the file is damaged or has no such column.
    """
    try:
        import pyarrow
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(f"{path}: reading parquet needs the package pyarrow; pip install 'llama_ds[parquet]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: damaged parquet file ({reason}); fetch or write it again") from None
    if "text" not in file.schema_arrow.names:
        raise UserError(
            f'{path}: no column "text", only {", ".join(file.schema_arrow.names)}; rename the texts\' column'
        )
    return file


def empty_file(path: str) -> UserError:
    """Return the error for a file without content."""
    return UserError(f"{path}: empty file (0 bytes); a corpus file holds text, delete it or narrow the pattern")


def _gzip_lines(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
        yield from unpacked


def _zstd_lines(file: BinaryIO, path: str) -> Iterator[bytes]:
    rest: list[bytes] = []
    for chunk in _zstd_chunks(file, path):
        *complete, last = chunk.split(b"\n")
        for line in complete:
            yield b"".join([*rest, line, b"\n"])
            rest = []
        rest.append(last)
    if any(rest):
        yield b"".join(rest)


def _zstd_chunks(file: BinaryIO, path: str) -> Iterator[bytes]:
    # Not the reader of the package, which does not detect a truncated file.
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path}: reading .zst needs the package zstandard; pip install zstandard") from None
    frame = None
    try:
        while data := file.read(READ_BYTES):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: damaged zstd file ({error}); fetch or write it again") from None
    if frame is not None:
        raise UserError(f"{path}: damaged zstd file (cut short at {file.tell()} bytes); fetch or write it again")


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb", READ_BUFFER)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _decode(data: bytes, path: str, offset: int = 0) -> str:
    if (at := data.find(b"\0")) >= 0:
        raise _BadDocument(
            f"{path}: binary file (NUL byte at offset {offset + at}); a corpus holds UTF-8 text only, "
            "narrow the pattern or convert the file"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _BadDocument(
            f"{path}: invalid UTF-8, byte 0x{data[error.start]:02x} at offset {offset + error.start}; "
            "convert the file to UTF-8 (iconv -t utf-8) or narrow the pattern"
        ) from None
