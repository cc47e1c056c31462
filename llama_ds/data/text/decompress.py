"""Decompression in bounded memory, and records of the decompressed bytes.

The readers of the standard library do not suffice: they take a damaged second stream of a bzip2 or xz file for padding,
and zstandard's does not notice that a file is cut short. Here the bytes end where the file's last stream ends.
"""

from __future__ import annotations

import bz2
import lzma
import os
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

from llama_ds.errors import UserError

SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bzip2"}
READ_BYTES = 1 << 14  # compressed bytes per read; small, because zstd may return thousands of times as much at once
OUTPUT_BYTES = 1 << 20  # decompressed bytes per chunk of the other formats
PADDED = ("gzip", "xz")  # formats whose streams may be followed by zero bytes
ZSTD_WINDOW = 1 << 31  # the largest window that zstd --long=31 uses; the library's own limit is 2**27
_MAGIC = {
    "gzip": (b"\x1f\x8b",),
    # A zstd file may begin with a skippable frame.
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i, 0x2A, 0x4D, 0x18]) for i in range(16))),
    "xz": (b"\xfd7zXZ\0",),
    "bzip2": tuple(b"BZh%d%s" % (level, block) for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")),
}


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's decompressor of one gzip member with the interface of bz2 and lzma."""

    needs_input = True

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        found = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        self.needs_input = len(found) < max_length
        return found


class _Zstd:
    """zstandard's decompressor of one frame with the interface of bz2 and lzma; its output has no limit."""

    needs_input = True

    def __init__(self) -> None:
        import zstandard

        self._frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._frame.decompress(data)


def without_compression(path: str) -> str:
    """Return a path without the suffix of a compression."""
    root, suffix = os.path.splitext(path)
    return root if suffix.lower() in SUFFIXES else path


def compression_of(head: bytes) -> str:
    """Return the compression of a file that begins with `head`, or ""."""
    return next((name for name, magic in _MAGIC.items() if head.startswith(magic)), "")


def decompressed(file: BinaryIO, compression: str, path: str) -> Iterator[bytes]:
    """Yield the bytes of `file` in chunks; without `compression`, as they are.

    Raises:
        UserError: the file is damaged or cut short; it names `path`.
    """
    if not compression:
        while data := file.read(OUTPUT_BYTES):
            yield data
        return
    stream: _Decompressor | None = None
    streams = consumed = 0
    while data := file.read(READ_BYTES):
        consumed += len(data)
        while data:
            if stream is None:
                data = data.lstrip(b"\0") if streams and compression in PADDED else data
                if not data:
                    break
                stream, streams = _new_stream(compression, path), streams + 1
            yield from _output(stream, data, compression, path)
            data, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
    if stream is not None or not streams:
        raise damaged(path, compression, f"cut short at {consumed} bytes")


def damaged(path: str, kind: str, reason: str) -> UserError:
    """Return the error for a damaged file."""
    return UserError(f"{path}: damaged {kind} file ({reason}); fetch or write it again")


def split_records(chunks: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
    """Yield the records of a stream, each with the separator at its end, the last one without if it has none."""
    rest: list[bytes] = []
    overlap = len(separator) - 1  # bytes of a chunk's end that may begin a separator
    tail = b""
    for chunk in chunks:
        *complete, last = (tail + chunk).split(separator)
        for record in complete:
            yield b"".join([*rest, record, separator])
            rest = []
        cut = len(last) - min(overlap, len(last))
        rest.append(last[:cut])
        tail = last[cut:]
    if record := b"".join([*rest, tail]):
        yield record


def _new_stream(compression: str, path: str) -> _Decompressor:
    if compression == "zstd":
        try:
            return _Zstd()
        except ImportError:
            raise UserError(f"{path}: reading .zst needs the package zstandard; pip install zstandard") from None
    kinds: dict[str, Any] = {"gzip": _Gzip, "bzip2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor}
    return kinds[compression]()


def _output(stream: _Decompressor, data: bytes, compression: str, path: str) -> Iterator[bytes]:
    """Yield what `data` decompresses to, up to the end of the stream."""
    while True:
        try:
            found = stream.decompress(data, OUTPUT_BYTES)
        except Exception as error:  # each library has its own types; none is of the operating system
            raise damaged(path, compression, str(error) or type(error).__name__) from None
        if found:
            yield found
        if stream.eof or stream.needs_input:
            return
        data = b""
