"""Lists in gzipped text, one entry a line, so that `zcat | grep` finds one."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterable
from typing import BinaryIO, TypeVar

from llama_ds.data.source.manifest import REBUILD
from llama_ds.errors import UserError

T = TypeVar("T")
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def write_lines(file: BinaryIO, lines: Iterable[str]) -> None:
    """Write the lines; the bytes depend on them alone."""
    with (
        gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
        io.TextIOWrapper(packed, "utf-8", "surrogateescape", newline="\n") as text,
    ):
        for line in lines:
            text.write(f"{line}\n")


def parse_lines(content: bytes, parse: Callable[[str], T], what: str) -> list[T]:
    """Return what `parse` makes of each line; `what` names the list and its file in the error.

    Raises:
        UserError: the list is damaged.
    """
    try:
        if not content:
            raise EOFError("0 bytes")
        lines = gzip.decompress(content).decode("utf-8", "surrogateescape").split("\n")
        return [parse(line) for line in lines[:-1]]
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(f"{what} ({error}); restore it from a copy, or {REBUILD}") from None


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
