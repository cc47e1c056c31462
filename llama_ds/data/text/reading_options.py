"""Command-line options for reading input files, shared by the tools that read texts."""

from __future__ import annotations

import argparse

from llama_ds.data.text.formats import ReadOptions
from llama_ds.errors import UserError

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\"}


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add --text-field, --separator, --as-text and --exclude."""
    group = parser.add_argument_group("reading the input")
    group.add_argument(
        "--text-field", default="text", metavar="FIELD", help="field or column of the text, such as a.b (default: text)"
    )
    words = r"ends a document within a text file, such as '<|endoftext|>' or '\n\n' (default: a file is one document)"
    group.add_argument("--separator", default="", metavar="STRING", help=words)
    words = "files that are plain text, whatever their content; may be repeated"
    group.add_argument("--as-text", action="append", default=[], metavar="GLOB", help=words)
    words = "files and folders to leave out of folders and globs; may be repeated"
    group.add_argument("--exclude", action="append", default=[], metavar="GLOB", help=words)


def reading_options(args: argparse.Namespace) -> ReadOptions:
    """Return the options of a command line."""
    return ReadOptions(args.text_field, _unescaped(args.separator), tuple(args.as_text), tuple(args.exclude))


def _unescaped(separator: str) -> str:
    found, chars = "", iter(separator)
    for char in chars:
        if char == "\\":
            escape = next(chars, "")
            if escape not in _ESCAPES:
                raise UserError(
                    f"--separator '{separator}': \\{escape} is not \\n, \\t, \\r, \\0 or \\\\; write one of these"
                )
            char = _ESCAPES[escape]
        found += char
    return found
