"""Index of the documents of a shard: the file index/SPLIT-NNNNNN.documents.gz.

It is text, so that `zcat | grep` finds a document. It has one line per document that overlaps the shard, in order:

    start <tab> length <tab> digest <tab> place

`start` is the position of the document's first id in the shard, whose row r holds the positions r*T ..
(r+1)*T (T seq_len); it is negative if the document began in an earlier shard. `length` counts the document's ids with
its marks, including those in other shards. `digest` is the first half of the sha256 of its text. `place` is the file,
or file:line, that it was read from; backslashes, tabs and line ends in it are escaped as in Python.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

from llama_ds.data.source.packed_lines import escape, parse_lines, unescape, write_lines

DIGEST_BYTES = 16


class IndexedDocument(NamedTuple):
    """One entry of the index."""

    start: int
    length: int
    digest: bytes
    place: str  # file, or file:line


def write_documents(file: BinaryIO, documents: Iterable[IndexedDocument]) -> None:
    """Write the index; the bytes depend on the documents alone."""
    write_lines(file, (f"{d.start}\t{d.length}\t{d.digest.hex()}\t{escape(d.place)}" for d in documents))


def parse_documents(content: bytes, path: str) -> list[IndexedDocument]:
    """Return the documents of the index with the given content.

    Raises:
        UserError: the index is damaged; the message names `path`.
    """
    return parse_lines(content, _parse, f"{path}: damaged index of documents")


def _parse(line: str) -> IndexedDocument:
    start, length, digest, where = line.split("\t")
    return IndexedDocument(int(start), int(length), bytes.fromhex(digest), unescape(where))
