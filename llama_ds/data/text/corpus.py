"""Documents of a corpus: the files that match a pattern, and their texts."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from llama_ds.data.text.piece_reader import JSON_LINES, PARQUET, PieceReader, TextPiece, empty_file
from llama_ds.errors import UserError

# Suffixes of text files in a folder; a glob or a file name accepts any suffix.
TEXT_SUFFIXES = (
    *(".txt", ".md", ".rst", ".tex", ".html", *JSON_LINES, PARQUET),
    *(".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".sh"),
)
_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # line ends as in str.splitlines
_LINE = re.compile(f"[^{_ENDS}]*(?:\r\n|[{_ENDS}])|[^{_ENDS}]+")


@dataclass(frozen=True)
class Document:
    """One text; `path` is its file, or file:line (parquet: file:row) where a file holds several."""

    path: str
    text: str


def source_files(pattern: str) -> list[str]:
    """Return the sorted files that match `pattern` (a file, a folder or a glob with `**`).

    Raises:
        UserError: no file matches.
    """
    if os.path.isdir(pattern):
        found = [f for f in _walk(pattern) if f.lower().endswith(TEXT_SUFFIXES)]
        if not found:
            raise UserError(
                f"{pattern}: the folder holds no text file (suffix {' '.join(TEXT_SUFFIXES)}); "
                f"name the files with a glob, such as '{os.path.join(pattern, '**', '*')}'"
            )
        return found
    found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    files = sorted({f for f in found if os.path.isfile(f)})
    if not files:
        raise UserError(f"{pattern}: no such file, and as a glob it matches no file; check the path, and quote globs")
    return files


def documents(pattern: str, max_chars: int = 0) -> Iterator[Document]:
    """Yield the documents of `pattern` (see `source_files`) in a fixed order; empty documents of a list are left out.

    With `max_chars`, longer documents are cut at line ends into documents of at most that many characters; a longer
    line is not cut.

    Raises:
        UserError: nothing matches, or a file is empty, binary, damaged, not UTF-8 or has no text; names file and line.
    """
    for path in source_files(pattern):
        reader = PieceReader(TextPiece(path))
        for line, text in reader:
            if not (text or line):
                raise empty_file(path)
            for part in cut(text, max_chars):
                yield Document(reader.where(line), part)


def cut(text: str, max_chars: int) -> Iterator[str]:
    """Yield the documents of a text: none if it is empty, pieces if it is longer than `max_chars` (0: no limit)."""
    if max_chars and len(text) > max_chars:
        yield from cut_at_lines(text, max_chars)
    elif text:
        yield text


def cut_at_lines(text: str, max_chars: int) -> Iterator[str]:
    """Yield consecutive pieces of `text`: whole lines, at most `max_chars` long unless one line is longer."""
    start = end = 0
    for line in _LINE.finditer(text):  # one at a time: a list of all lines may take more memory than a long text
        if end > start and line.end() - start > max_chars:
            yield text[start:end]
            start = end
        end = line.end()
    if end > start:
        yield text[start:end]


def _walk(folder: str) -> list[str]:
    return sorted(os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
