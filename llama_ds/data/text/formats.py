"""Formats of input files, recognised by content; the name decides only where the content does not."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from dataclasses import dataclass
from itertools import chain

from llama_ds.data.text import decompress, json_values, mds
from llama_ds.data.text.input_storage import is_remote, open_input
from llama_ds.errors import UserError

HEAD_BYTES = 1 << 16  # bytes of a file, decompressed, that decide about its format
BOM = b"\xef\xbb\xbf"

TEXT, BINARY, EMPTY = "text", "binary", "empty"
JSON_LINES, JSON_VALUES = "JSON lines", "JSON"
PARQUET, ARROW_STREAM, ARROW_FILE = "parquet", "Arrow stream", "Arrow"
COLUMNS = (PARQUET, ARROW_STREAM, ARROW_FILE)
MEGATRON, MEGATRON_INDEX = "Megatron ids", "index of Megatron ids"
MDS = mds.KIND

# Suffixes of texts that no other format has: their content is not examined.
PLAIN_SUFFIXES = (
    *(".md", ".rst", ".tex", ".html"),
    *(".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".sh"),
)
TEXT_SUFFIXES = (".txt", *PLAIN_SUFFIXES)
LINES_SUFFIXES = (".jsonl", ".ndjson")
_OF_CONTENT = {".parquet": PARQUET, ".arrow": ARROW_STREAM, ".feather": ARROW_FILE, ".mds": MDS}
# Files of records that are not read, and what to do about them.
_UNREAD = {
    **dict.fromkeys((".csv", ".tsv"), "write the texts as JSON lines or parquet"),
    **dict.fromkeys((".tar", ".tgz", ".zip", ".7z", ".rar"), "unpack the archive"),
    **dict.fromkeys((".lz4", ".lzo", ".snappy", ".br", ".lzma", ".z"), "compress the file with zstd or gzip"),
    **dict.fromkeys((".avro", ".orc", ".h5", ".hdf5", ".tfrecord", ".msgpack", ".lance"), "write it as parquet"),
    **dict.fromkeys((".warc", ".wet", ".wat"), "extract the texts as JSON lines"),
    **dict.fromkeys((".pkl", ".pickle", ".npy", ".npz"), "write it as parquet"),
}
# What a clone without the contents of large files holds in their place.
_POINTERS = {b"version https://git-lfs.github.com/spec/": "git lfs pull", b"/annex/objects/": "git annex get"}
POINTER_BYTES = 1024  # a pointer is shorter
_ARROW_STREAM_MAGIC = b"\xff\xff\xff\xff"
_MEGATRON_MAGIC = b"MMIDIDX\0\0"
_MDS_CONFIG = re.compile(rb'"format": ?"mds"')


@dataclass(frozen=True)
class ReadOptions:
    """Options for finding and reading the input."""

    text_field: str = "text"  # field or column of the text; a.b is field b of field a
    separator: str = ""  # ends a document of a text file; "": a text file is one document
    as_text: tuple[str, ...] = ()  # patterns of files that are texts, whatever their content
    exclude: tuple[str, ...] = ()  # patterns of files and folders that are left out of folders and globs

    def flags(self) -> dict[str, object]:
        """Return the options that change the documents of a file, for the fingerprint of a build."""
        return {"text field": self.text_field, "separator": self.separator, "as text": list(self.as_text)}


@dataclass(frozen=True)
class FileFormat:
    """What a file holds."""

    content: str
    compression: str = ""

    def __str__(self) -> str:
        return f"{self.compression} of {self.content}" if self.compression else self.content

    @property
    def is_list(self) -> bool:
        """Whether the file may hold several documents whatever the options are."""
        return self.content not in (TEXT, BINARY, EMPTY)


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches the path, its end after a slash, or its last component."""
    return any(fnmatch.fnmatchcase(path, p) or fnmatch.fnmatchcase(path, f"*/{p}") for p in patterns)


def content_suffix(path: str) -> str:
    """Return the suffix of a file name in lower case, without that of a compression: ".jsonl" of a.JSONL.gz."""
    root, suffix = os.path.splitext(os.path.basename(path).lower())
    return os.path.splitext(root)[1] if suffix in decompress.SUFFIXES else suffix


def recognise(path: str, options: ReadOptions) -> FileFormat:
    """Return the format of a file.

    Raises:
        UserError: the file cannot be read, contradicts its name, or holds records in a format that is not read.
    """
    head = _head(path, "")
    _check_no_pointer(path, head, options)
    compression = decompress.compression_of(head)
    named = decompress.SUFFIXES.get(os.path.splitext(path.lower())[1], "")
    if named and head and compression != named:
        raise decompress.damaged(path, named, f"its content is {compression or 'not compressed'}")
    if compression:
        head = _head(path, compression)
        if twice := decompress.compression_of(head):
            raise UserError(f"{path}: {twice} data within {compression}; unpack the file once")
    if matches(path, options.as_text):
        return FileFormat(TEXT, compression)
    suffix = content_suffix(path)
    if suffix in _UNREAD:
        raise UserError(
            f"{path}: {suffix} files are not read; {_UNREAD[suffix]}, or leave them out with --exclude '*{suffix}*'"
        )
    content = _content(path, head, suffix)
    if compression and content in (*COLUMNS, BINARY, MEGATRON):
        raise UserError(
            f"{path}: {content} data within {compression}; only text and JSON are read compressed, unpack the file "
            f"or leave it out with --exclude '{os.path.basename(path)}'"
        )
    if suffix in _OF_CONTENT and content not in (*COLUMNS, MDS) and head:
        kind = suffix.removeprefix(".")
        raise decompress.damaged(path, kind, f"it does not begin as a {kind} file")
    if content == MDS and is_remote(path):
        raise UserError(f"{path}: {MDS} shards are read from a disk only; download their folder first")
    return FileFormat(content, compression)


def _check_no_pointer(path: str, head: bytes, options: ReadOptions) -> None:
    if len(head) > POINTER_BYTES or matches(path, options.as_text):
        return
    for mark, fetch in _POINTERS.items():
        if head.startswith(mark):
            raise UserError(
                f"{path}: a pointer in place of the file, as a clone leaves it; fetch the file with {fetch}, or leave "
                f"it out with --exclude '{os.path.basename(path)}'"
            )


def _head(path: str, compression: str) -> bytes:
    found = b""
    with open_input(path) as file:
        if not compression:
            return file.read(HEAD_BYTES)
        for chunk in decompress.decompressed(file, compression, path):
            found += chunk
            if len(found) >= HEAD_BYTES:
                break
    return found[:HEAD_BYTES]


def _content(path: str, head: bytes, suffix: str) -> str:
    if suffix in PLAIN_SUFFIXES:
        return TEXT
    if head.startswith(_MEGATRON_MAGIC):
        return MEGATRON_INDEX
    if suffix == ".bin" and _has_index(path):
        return MEGATRON
    if head.startswith(b"PAR1"):
        return PARQUET
    if head.startswith(b"ARROW1\0\0"):
        return ARROW_FILE
    if head.startswith(_ARROW_STREAM_MAGIC):
        return ARROW_STREAM
    if mds.begins_as_shard(head) and (suffix == ".mds" or _MDS_CONFIG.search(head)):
        return MDS
    if suffix in LINES_SUFFIXES or suffix == ".json":
        return _json_content(head, suffix)
    if not head:
        return TEXT if suffix in TEXT_SUFFIXES else EMPTY
    if _is_json_lines(head):
        return JSON_LINES
    start = head.removeprefix(BOM).lstrip()
    if re.match(rb'\[\s*\{\s*"|\{\s*\n\s*"', start) or _begins_with_values(start):
        return JSON_VALUES
    return TEXT if suffix in TEXT_SUFFIXES or _is_utf8(head) else BINARY


def companions(path: str) -> list[str]:
    """Return the files that belong to a file of the input: NAME.idx to the NAME.bin of Megatron-LM."""
    return [megatron_index(path)] if path.endswith(".bin") and not is_remote(path) and _has_index(path) else []


def megatron_index(path: str) -> str:
    """Return the path of the index of NAME.bin."""
    return f"{os.path.splitext(path)[0]}.idx"


def _has_index(path: str) -> bool:
    """Whether an index of Megatron-LM lies beside NAME.bin."""
    index = megatron_index(path)
    return os.path.exists(index) and _head(index, "").startswith(_MEGATRON_MAGIC)


def _json_content(head: bytes, suffix: str) -> str:
    """Return the kind of JSON in a file whose name says that it is JSON."""
    start = head.removeprefix(BOM).lstrip()
    if start.startswith(b"["):
        return JSON_VALUES
    return JSON_LINES if suffix in LINES_SUFFIXES or _is_json_lines(head) or not start else JSON_VALUES


def _is_json_lines(head: bytes) -> bool:
    """Whether the first line is a JSON object, or the start of one that is longer than the head."""
    line, newline, _ = head.removeprefix(BOM).lstrip().partition(b"\n")
    if not newline and len(head) == HEAD_BYTES:
        return bool(re.match(rb'\{\s*"', line))
    if not line.startswith(b"{"):
        return False
    try:
        return isinstance(json_values.parse(line.decode()), dict)
    except json_values.TooDeep:  # it is read as JSON, and thus refused: it must not become one text
        return True
    except ValueError:
        return False


def _begins_with_values(start: bytes) -> bool:
    """Whether a text begins with JSON objects that no line ends separate, as those of old Macs, or none at all."""
    if not re.match(rb'\{\s*"', start):
        return False
    try:
        value, stop = json.JSONDecoder().raw_decode(start.decode(errors="replace"))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and start.decode(errors="replace")[stop:].lstrip().startswith("{")


def _is_utf8(head: bytes) -> bool:
    if b"\0" in head:
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3 and len(head) == HEAD_BYTES  # a character that the head cuts
    return True


def known_suffixes() -> list[str]:
    """Return the suffixes of files that are taken from a folder, for messages."""
    return list(chain(TEXT_SUFFIXES, LINES_SUFFIXES, (".json",), _OF_CONTENT))
