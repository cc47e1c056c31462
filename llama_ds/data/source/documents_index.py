"""Index of the documents of a shard: the file index/SPLIT-NNNNNN.documents.gz.

It is text, so that `zcat | grep` finds a document. It has one line per document that overlaps the shard, in order:

    start <tab> length <tab> digest <tab> place

`start` is the position of the document's first id in the shard, whose row r holds the positions r*T ..
(r+1)*T (T seq_len); it is negative if the document began in an earlier shard. `length` counts the document's ids with
its marks, including those in other shards. `digest` is the first half of the sha256 of its text. `place` is the file,
or file:line, that it was read from; backslashes, tabs and line ends in it are escaped as in Python.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

from llama_ds.data.source.manifest import REBUILD
from llama_ds.errors import UserError

DIGEST_BYTES = 16
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


class IndexedDocument(NamedTuple):
    """One entry of the index."""

    start: int
    length: int
    digest: bytes
    place: str  # file, or file:line


def write_documents(file: BinaryIO, documents: Iterable[IndexedDocument]) -> None:
    """Write the index; the bytes depend on the documents alone."""
    with (
        gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
        io.TextIOWrapper(packed, "utf-8", "surrogateescape", newline="\n", write_through=False) as text,
    ):
        for d in documents:
            text.write(f"{d.start}\t{d.length}\t{d.digest.hex()}\t{escape(d.place)}\n")


def parse_documents(content: bytes, path: str) -> list[IndexedDocument]:
    """Return the documents of the index with the given content.

    Raises:
        UserError: the index is damaged; the message names `path`.
    """
    try:
        if not content:
            raise EOFError("0 bytes")
        lines = gzip.decompress(content).decode("utf-8", "surrogateescape").split("\n")
        return [_parse(line) for line in lines[:-1]]
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: damaged index of documents ({error}); restore it from a copy, or {REBUILD}") from None


def escape(text: str) -> str:
    """Escape backslashes, tabs and line ends as in Python."""
    return text.translate(_ESCAPES)


def unescape(text: str) -> str:
    """Return the text that `escape` turns into `text`."""
    if "\\" not in text:
        return text
    first, *others = text.split("\\\\")
    for plain, escaped in (("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        first, others = first.replace(escaped, plain), [other.replace(escaped, plain) for other in others]
    return "\\".join([first, *others])


def _parse(line: str) -> IndexedDocument:
    start, length, digest, where = line.split("\t")
    return IndexedDocument(int(start), int(length), bytes.fromhex(digest), unescape(where))
