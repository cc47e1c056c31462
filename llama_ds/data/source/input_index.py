"""List of the input files of a build: the file index/input-NNNN.gz, by which a source knows what it already holds.

It is text with one line per file, in the order in which the build read them:

    sha256 <tab> size <tab> path

`sha256` and `size` are those of the file's bytes; `path` is escaped as in the index of documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

from llama_ds.data.source.packed_lines import escape, parse_lines, unescape, write_lines

INPUT_FILE = re.compile(r"input-(\d+)\.gz")


class ListedFile(NamedTuple):
    """An input file that a build has read."""

    sha256: str
    size: int
    path: str


def input_name(number: int) -> str:
    """Return the name of the list that belongs to entry `number` of `Manifest.inputs`."""
    return f"index/input-{number:04d}.gz"


def write_inputs(file: BinaryIO, files: Iterable[ListedFile]) -> None:
    """Write the list; the bytes depend on the files alone."""
    write_lines(file, (f"{f.sha256}\t{f.size}\t{escape(f.path)}" for f in files))


def parse_inputs(content: bytes, path: str) -> list[ListedFile]:
    """Return the files of the list with the given content.

    Raises:
        UserError: the list is damaged; the message names `path`.
    """
    return parse_lines(content, _parse, f"{path}: damaged list of inputs")


def _parse(line: str) -> ListedFile:
    sha256, size, path = line.split("\t")
    return ListedFile(sha256, int(size), unescape(path))
