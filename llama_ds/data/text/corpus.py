"""Documents of a corpus: the files that match a pattern, and their texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llama_ds.data.text.formats import ReadOptions
from llama_ds.data.text.input_storage import input_size
from llama_ds.data.text.inputs import find_inputs
from llama_ds.data.text.piece_reader import PieceReader, TextPiece, empty_file

_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # line ends as in str.splitlines
_LINE = re.compile(f"[^{_ENDS}]*(?:\r\n|[{_ENDS}])|[^{_ENDS}]+")


@dataclass(frozen=True)
class Document:
    """One text; `path` is its file, or file:line (parquet: file:row) where a file holds several."""

    path: str
    text: str


def documents(pattern: str, max_chars: int = 0, options: ReadOptions | None = None) -> Iterator[Document]:
    """Yield the documents of `pattern` (see `find_inputs`) in a fixed order; empty documents of a list are left out.

    With `max_chars`, longer documents are cut at line ends into documents of at most that many characters; a longer
    line is not cut.

    Raises:
        UserError: nothing matches, or a file is empty, binary, damaged, not UTF-8 or has no text; names file and line.
    """
    options = options or ReadOptions()
    for file in find_inputs(pattern, options).files:
        reader = PieceReader(TextPiece(file.path, format=file.format), options=options)
        for line, text in reader:
            if not (text or line):
                raise empty_file(file.path, input_size(file.path))
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
