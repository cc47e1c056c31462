"""Documents from text files: plain text of any kind, one document per file, and JSON lines with a "text" field."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from llama_ds.errors import UserError

# What counts as text when a whole folder is named; a glob or a file name takes files of any suffix.
TEXT_SUFFIXES = (
    *(".txt", ".md", ".rst", ".tex", ".html", ".jsonl"),
    *(".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".sh"),
)


@dataclass(frozen=True)
class Document:
    """One text; `path` is its file, or file:line in a .jsonl file."""

    path: str
    text: str


def source_files(pattern: str) -> list[str]:
    """Return the files that `pattern` (a file, a folder or a glob with `**`) names, sorted.

    Raises:
        UserError: when there are none.
    """
    if os.path.isdir(pattern):
        found = [f for f in _walk(pattern) if os.path.splitext(f)[1].lower() in TEXT_SUFFIXES]
        if not found:
            raise UserError(
                f"{pattern}: the folder holds no text file (suffix {' '.join(TEXT_SUFFIXES)}); "
                f"name the files with a glob, such as '{os.path.join(pattern, '**', '*')}'"
            )
        return found
    found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    files = sorted(f for f in found if os.path.isfile(f))
    if not files:
        raise UserError(f"{pattern}: no such file, and as a pattern it matches nothing; check the path and quote globs")
    return files


def documents(pattern: str, max_chars: int = 0) -> Iterator[Document]:
    """Yield the documents of `pattern` (see `source_files`) in a fixed order.

    With `max_chars`, longer documents are cut after line ends into documents of at most that many characters
    (a line longer than that stays whole).

    Raises:
        UserError: nothing matches, or a file is empty, binary, not UTF-8 or not JSON lines; names file and offset.
    """
    for path in source_files(pattern):
        for document in _json_lines(path) if path.endswith(".jsonl") else _whole_file(path):
            if max_chars and len(document.text) > max_chars:
                yield from (Document(document.path, part) for part in cut_at_lines(document.text, max_chars))
            else:
                yield document


def cut_at_lines(text: str, max_chars: int) -> Iterator[str]:
    """Yield consecutive pieces of `text`: whole lines, at most `max_chars` long unless one line is longer."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if piece and size + len(line) > max_chars:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield "".join(piece)


def _walk(folder: str) -> list[str]:
    return sorted(os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)


def _whole_file(path: str) -> Iterator[Document]:
    yield Document(path, _decode(_read(path), path).removeprefix("\ufeff"))


def _json_lines(path: str) -> Iterator[Document]:
    if os.path.getsize(path) == 0:
        raise _empty(path)
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, offset)
            offset += len(line)
            if text.strip():
                yield from _json_document(text, f"{path}:{number}")


def _json_document(line: str, place: str) -> Iterator[Document]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error}); every line of a .jsonl file is one JSON object") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{place}: no "text" of type string; every line of a .jsonl file is {{"text": "..."}}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: character {error.start} is half of a surrogate pair; write it as UTF-8") from None
    if text:
        yield Document(place, text)


def _read(path: str) -> bytes:
    with _open(path) as file:
        data = file.read()
    if not data:
        raise _empty(path)
    return data


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _decode(data: bytes, path: str, offset: int = 0) -> str:
    if (at := data.find(b"\0")) >= 0:
        raise UserError(
            f"{path}: binary file (NUL byte at offset {offset + at}); a corpus holds UTF-8 text only, "
            "narrow the pattern or convert the file"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: invalid UTF-8, byte 0x{data[error.start]:02x} at offset {offset + error.start}; "
            "convert the file to UTF-8 (iconv -t utf-8) or narrow the pattern"
        ) from None


def _empty(path: str) -> UserError:
    return UserError(f"{path}: empty file (0 bytes); a corpus file holds text, delete it or narrow the pattern")
