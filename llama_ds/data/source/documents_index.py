"""Which documents stand where in a shard: the file index/SPLIT-NNNNNN.documents.gz beside it.

It is text, so that `zcat | grep` finds a document: one line for every document that has an id in the shard, in order,

    start <tab> length <tab> digest <tab> place

`start` is the position of the document's bos among the shard's ids, where row r of the shard holds the positions r*T ..
(r+1)*T (T seq_len); it is negative when the document began in an earlier shard. `length` counts the document's ids with
bos and eos, also those in other shards. `digest` is the first half of the sha256 of its text. `place` is the file, or
file:line, that it was read from; backslash, tab and line ends in it are spelt as in Python.
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
    """Where a document stands."""

    start: int
    length: int
    digest: bytes
    place: str


def write_documents(file: BinaryIO, documents: Iterable[IndexedDocument]) -> None:
    """Write the index; equal documents give equal bytes."""
    with (
        gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
        io.TextIOWrapper(packed, "utf-8", "surrogateescape", newline="\n", write_through=False) as text,
    ):
        for d in documents:
            text.write(f"{d.start}\t{d.length}\t{d.digest.hex()}\t{d.place.translate(_ESCAPES)}\n")


def parse_documents(content: bytes, place: str) -> list[IndexedDocument]:
    """Return the documents of the index that was read from `place`.

    Raises:
        UserError: it is damaged.
    """
    try:
        if not content:
            raise EOFError("0 bytes")
        lines = gzip.decompress(content).decode("utf-8", "surrogateescape").split("\n")
        return [_parse(line) for line in lines[:-1]]
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(
            f"{place}: damaged index of documents ({error}); restore it from a copy, or {REBUILD}"
        ) from None


def _parse(line: str) -> IndexedDocument:
    start, length, digest, place = line.split("\t")
    return IndexedDocument(int(start), int(length), bytes.fromhex(digest), _unescape(place))


def _unescape(place: str) -> str:
    if "\\" not in place:
        return place
    first, *others = place.split("\\\\")
    for plain, spelt in (("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        first, others = first.replace(spelt, plain), [other.replace(spelt, plain) for other in others]
    return "\\".join([first, *others])
