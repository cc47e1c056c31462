"""Reading the texts of a file or of a piece of a file: JSON, parquet, Arrow, or plain text.

Any process can read a piece without reading the file before it. Lines are counted from the start of the piece (items
of a JSON array, rows of a table and documents between separators count as lines); only an error message needs the line
number in the file, and then the reader scans the file up to the piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO

import orjson

from llama_ds.data.text.columns import arrow_values, parquet_values, row_counts
from llama_ds.data.text.decompress import damaged, decompressed, split_records
from llama_ds.data.text.formats import (
    ARROW_FILE,
    ARROW_STREAM,
    BOM,
    JSON_LINES,
    JSON_VALUES,
    MDS,
    MEGATRON,
    PARQUET,
    FileFormat,
    ReadOptions,
    recognise,
)
from llama_ds.data.text.input_storage import input_size, open_input
from llama_ds.data.text.json_values import BrokenStream, field_of, fields_of, parse, values
from llama_ds.data.text.mds import mds_values
from llama_ds.errors import UserError

EMPTY_DOCUMENT = "empty document"
BLOCK = 1 << 20  # bytes per read
# Encodings of several bytes a character, by the marks with which files begin; UTF-32's begins as UTF-16's.
WIDE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
ESCAPE = "\\u"  # in JSON that was decoded from UTF-8, the only way to write half of a surrogate pair
SURROGATE = re.compile("[\ud800-\udfff]")  # searched for, because encoding a text to find one would copy it


@dataclass(frozen=True)
class TextPiece:
    """A file or a piece of it, start .. stop - 1: bytes of lines, row groups of a parquet file, or documents."""

    path: str
    start: int = 0
    stop: int | None = None  # None: the end of the file
    size: int = 0  # bytes of the file that the piece accounts for, for progress bars
    format: FileFormat | None = None  # None: recognised when the piece is read


@dataclass
class LeftOut:
    """Documents of a piece that were left out for one reason."""

    count: int
    first: int  # line of the first of them


class _BadDocument(Exception):
    """A malformed document: the reason, which is the same for all documents of the kind, and details with the fix."""

    def __init__(self, reason: str, details: str) -> None:
        super().__init__(details)
        self.reason = reason


class PieceReader:
    """Iterates over (line, text) of a piece; the line is 0 where the file is one text.

    `lines` counts the lines read so far; `share` is the fraction of the piece read so far. With `skip_bad`, documents
    that are binary, not UTF-8 or not JSON with a text are left out and counted by reason in `left_out`. With None, the
    error message does not mention the option --skip-bad.

    Raises:
        UserError: the file is empty, binary, damaged or not UTF-8, or a line has no text; names file and line.
    """

    def __init__(self, piece: TextPiece, skip_bad: bool | None = None, options: ReadOptions | None = None) -> None:
        self.piece = piece
        self.lines = 0
        self.share = 0.0
        self.left_out: dict[str, LeftOut] = {}
        self._skip_bad, self._options = skip_bad, options or ReadOptions()
        self._format = piece.format or recognise(piece.path, self._options)
        self.is_list = self._format.is_list or bool(self._options.separator)  # whether the file may hold several texts

    def __iter__(self) -> Iterator[tuple[int, str]]:
        if self._format.content == MEGATRON:
            raise UserError(f"{self.piece.path}: holds ids, not text; only tools/shards.py build imports them")
        if self._format.content == PARQUET:
            return self._rows(self._parquet())
        if self._format.content in (ARROW_STREAM, ARROW_FILE):
            return self._rows(arrow_values(self.piece.path, self._format.content, self._options.text_field))
        if self._format.content == MDS:
            return self._rows(self._mds())
        if self._format.content == JSON_LINES:
            return self._json(self._records(b"\n"))
        if self._format.content == JSON_VALUES:
            return self._json(self._json_values())
        return self._separated_texts() if self._options.separator else self._one_text()

    def where(self, line: int) -> str:
        """Return file:line, with the line number in the file."""
        if not line:
            return self.piece.path
        return f"{self.piece.path}:{self._lines_before() + line}"

    def leave_out(self, reason: str, line: int) -> None:
        """Count a document that is left out."""
        self.left_out.setdefault(reason, LeftOut(0, line)).count += 1

    def _one_text(self) -> Iterator[tuple[int, str]]:
        with open_input(self.piece.path) as file:
            chunks = decompressed(file, self._format.compression, self.piece.path)
            data = b"".join(chunks) if self._format.compression else file.read()
        self.share = 1.0
        try:
            text = _decode(data).removeprefix("\ufeff")
        except _BadDocument as error:
            self._leave_out_bad(error)
            return
        del data  # otherwise a long text would be held twice
        yield 0, text

    def _separated_texts(self) -> Iterator[tuple[int, str]]:
        separator = self._options.separator.encode()
        for offset, data in self._records(separator):
            self.lines += 1
            text = data.removesuffix(separator)
            if text.isspace() or not text:
                continue
            try:
                found = _decode(text, offset)
            except _BadDocument as error:
                self._leave_out_bad(error)
                continue
            yield self.lines, found if offset else found.removeprefix("\ufeff")

    def _json(self, items: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, str]]:
        for offset, data in items:
            self.lines += 1
            if data.startswith(BOM):  # also in the middle of a file that was joined of several
                data, offset = data.removeprefix(BOM), offset + len(BOM)
            if not data or data.isspace():
                continue
            text = self._quick_text_of(data)
            if text is None:
                try:
                    text = self._text_of(_decode(data, offset))
                except _BadDocument as error:
                    self._leave_out_bad(error)
                    continue
            yield self.lines, text

    def _json_values(self) -> Iterator[tuple[int, bytes]]:
        try:
            yield from values(self._chunks())
        except BrokenStream as error:
            raise damaged(self.piece.path, "JSON", f"after item {self.lines}, {error}") from None

    def _chunks(self) -> Iterator[bytes]:
        """Yield the decompressed bytes of the file."""
        path = self.piece.path
        size = input_size(path)
        if not size:
            raise empty_file(path)
        with open_input(path) as file:
            for chunk in decompressed(file, self._format.compression, path):
                yield chunk
                self.share = file.tell() / size

    def _records(self, separator: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield the offset and the bytes of each record that starts in the piece, with its separator."""
        if not self._format.compression:
            yield from self._records_of_range(separator)
            return
        offset = 0
        for data in split_records(self._chunks(), separator):
            yield offset, data
            offset += len(data)

    def _records_of_range(self, separator: bytes) -> Iterator[tuple[int, bytes]]:
        path, start = self.piece.path, self.piece.start
        size = input_size(path)
        if not size:
            raise empty_file(path)
        stop = size if self.piece.stop is None else self.piece.stop
        with open_input(path) as file:
            offset = max(0, start - len(separator))
            file.seek(offset)
            records = iter(file) if separator == b"\n" else split_records(_blocks(file), separator)
            if start and separator == b"\n":  # skip the rest of a record that starts in the piece before
                offset += _skip_line(file, stop - offset)
            elif start:
                offset += len(next(records, b""))
            while offset < stop and (data := next(records, b"")):
                yield offset, data
                offset += len(data)
                self.share = min(1.0, (offset - start) / max(1, stop - start))

    def _parquet(self) -> Iterator[list[object]]:
        path, field = self.piece.path, self._options.text_field
        counts = row_counts(path, field)
        groups = range(self.piece.start, len(counts) if self.piece.stop is None else self.piece.stop)
        rows = sum(counts[group] for group in groups)
        for batch in parquet_values(path, field, groups):
            yield batch
            self.share = self.lines / max(1, rows)

    def _mds(self) -> Iterator[list[object]]:
        for batch, share in mds_values(self.piece.path, self._format.compression, self._options.text_field):
            yield batch
            self.share = share

    def _rows(self, batches: Iterable[list[object]]) -> Iterator[tuple[int, str]]:
        for batch in batches:
            for value in batch:
                self.lines += 1
                try:
                    text = self._checked(_decode(value) if isinstance(value, bytes) else value, None)
                except _BadDocument as error:
                    self._leave_out_bad(error)
                    continue
                yield self.lines, text
        self.share = 1.0

    def _leave_out_bad(self, error: _BadDocument) -> None:
        if not self._skip_bad:
            hint = "" if self._skip_bad is None else ", or leave such documents out with --skip-bad"
            raise UserError(f"{self.where(self.lines)}: {error}{hint}") from None
        self.leave_out(error.reason, self.lines)

    def _quick_text_of(self, data: bytes) -> str | None:
        """Return the text of a JSON value; None if orjson, which is stricter than `_text_of`, finds none.

        It refuses invalid UTF-8, halves of surrogate pairs, NaN and deeply nested values.
        """
        try:
            record = orjson.loads(data)
        except orjson.JSONDecodeError:
            return None
        is_text = isinstance(record, str) and self._format.content == JSON_VALUES
        found = record if is_text else field_of(record, self._options.text_field)
        return found if isinstance(found, str) else None

    def _text_of(self, item: str) -> str:
        try:
            record = parse(item)
        except ValueError as error:
            is_lines = self._format.content == JSON_LINES
            rule = "every line is one JSON object" if is_lines else "every item is one JSON object"
            raise _BadDocument("not JSON", f"not JSON ({error}); {rule}") from None
        if isinstance(record, str) and self._format.content == JSON_VALUES:
            return self._checked(record, record, item)
        return self._checked(field_of(record, self._options.text_field), record, item)

    def _checked(self, text: object, record: object, item: str = "") -> str:
        if not isinstance(text, str):
            field = self._options.text_field
            others = list(islice(fields_of(record), 9))
            advice = f"name its text with --text-field, of {', '.join(others)}" if others else "a document is a string"
            raise _BadDocument(f'no "{field}" of type string', f'no "{field}" of type string; {advice}')
        if ESCAPE in item and (half := SURROGATE.search(text)):
            raise _BadDocument(
                "half of a surrogate pair", f"character {half.start()} is half of a surrogate pair; write it as UTF-8"
            )
        return text

    def _lines_before(self) -> int:
        path, start = self.piece.path, self.piece.start
        if not start:
            return 0
        if self._format.content == PARQUET:
            return sum(row_counts(path, self._options.text_field)[:start])
        separator = b"\n" if self._format.content == JSON_LINES else self._options.separator.encode()
        with open_input(path) as file:  # records starting before byte `start`: the first, and one per separator
            return 1 + sum(r.endswith(separator) for r in split_records(_blocks(file, start - 1), separator))


def empty_file(path: str, size: int = 0) -> UserError:
    """Return the error for a file without text."""
    return UserError(f"{path}: empty file ({size} bytes); a corpus file holds text, delete it or narrow the pattern")


def _blocks(file: BinaryIO, size: int | None = None) -> Iterator[bytes]:
    """Yield the rest of a file, or its next `size` bytes."""
    while data := file.read(BLOCK if size is None else min(BLOCK, size)):
        yield data
        size = None if size is None else size - len(data)


def _skip_line(file: BinaryIO, size: int) -> int:
    """Read to the end of a line or `size` bytes, without a long line in memory; return the number of bytes."""
    skipped = 0
    while skipped < size and (data := file.readline(min(BLOCK, size - skipped))):
        skipped += len(data)
        if data.endswith(b"\n"):
            break
    return skipped


def _decode(data: bytes, offset: int = 0) -> str:
    if not offset and (name := next((WIDE[mark] for mark in WIDE if data.startswith(mark)), "")):
        raise _BadDocument(name, f"{name} text; convert the file to UTF-8 (iconv -f {name.lower()} -t utf-8)")
    if (at := data.find(b"\0")) >= 0:
        raise _BadDocument(
            "binary data",
            f"binary file (NUL byte at offset {offset + at}); a corpus holds UTF-8 text only, narrow the pattern or "
            "convert the file",
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _BadDocument(
            "invalid UTF-8",
            f"invalid UTF-8, byte 0x{data[error.start]:02x} at offset {offset + error.start}; convert the file to "
            "UTF-8 (iconv -t utf-8) or narrow the pattern",
        ) from None
