"""JSON values one by one from a stream of bytes: the items of an array, or values that follow each other.

Only the value in progress is in memory. Strings and brackets show where a value ends; whether it is valid JSON is
decided when it is parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_ITEM = 1 << 30  # bytes of one value; a longer one is the sign of a quote or a bracket that is never closed
_STRUCTURE = re.compile(rb'[\[\]{},"]')
_IN_STRING = re.compile(rb'[^"\\\n]*(?:\\.[^"\\\n]*)*', re.DOTALL)


class BrokenStream(Exception):
    """The values of a stream cannot be told apart from some byte on."""


class TooDeep(ValueError):
    """A JSON text with too many levels of objects and arrays."""


def parse(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON.
        TooDeep: its objects and arrays are nested deeper than Python's parser reads.
    """
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a number of more digits than Python converts; no reader of texts needs it
            return json.loads(text, parse_int=str)
    except RecursionError:
        raise TooDeep("objects or arrays are nested too deeply, in hundreds of levels") from None


def field_of(record: object, path: str) -> object:
    """Return the value of the field `path`, where a.b is field b of field a, or None.

    A field whose own name is "a.b" comes first.
    """
    if isinstance(record, dict):
        if path in record:
            return record[path]
        for dot in (i for i, char in enumerate(path) if char == "."):
            if (found := field_of(record.get(path[:dot]), path[dot + 1 :])) is not None:
                return found
    return None


def fields_of(record: object) -> Iterator[str]:
    """Yield the fields of a record that hold a string, in the form that `field_of` takes."""
    levels = [_items("", record)]  # a stack, because a recursive call could nest deeper than the parser did
    while levels:
        for path, value in levels[-1]:
            if isinstance(value, str):
                yield path
            elif isinstance(value, dict):
                levels.append(_items(f"{path}.", value))
                break
        else:
            levels.pop()


def _items(prefix: str, record: object) -> Iterator[tuple[str, object]]:
    """Return an iterator over the (path, value) of the fields of a record."""
    return iter([(f"{prefix}{name}", value) for name, value in record.items()] if isinstance(record, dict) else ())


def values(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and the text of each value; the items of arrays at the top count as values.

    Raises:
        BrokenStream: the stream ends within a value or an array, or its brackets do not match.
    """
    scanner = _Scanner()
    for chunk in chunks:
        yield from scanner.feed(chunk)
    yield from scanner.end()


class _Scanner:
    """Finds the ends of values; the buffer holds the bytes from the start of the value in progress."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._base = 0  # offset of the buffer in the stream
        self._start = 0  # start of the value in progress
        self._at = 0  # bytes before it have been scanned
        self._depth = 0  # open brackets within the value
        self._in_array = self._in_string = False

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """Add bytes; yield the values that they complete."""
        self._buffer += chunk
        while token := self._next():
            yield from self._take(token)
        del self._buffer[: self._start]
        self._base, self._at, self._start = self._base + self._start, self._at - self._start, 0
        if len(self._buffer) > MAX_ITEM:
            raise BrokenStream(f"the value at byte {self._base} does not end within {MAX_ITEM >> 20} MiB")

    def end(self) -> Iterator[tuple[int, bytes]]:
        """Yield the last value."""
        if self._depth or self._in_string or self._in_array:
            raise BrokenStream(f"cut short: the file ends within a value or an array, after byte {self._base}")
        yield from self._value(len(self._buffer))

    def _next(self) -> str:
        """Return the next structural character outside of strings, or "" if more bytes are needed."""
        while True:
            if self._in_string and not self._skip_string():
                return ""
            match = _STRUCTURE.search(self._buffer, self._at)
            if match is None:
                self._at = len(self._buffer)
                return ""
            self._at = match.end()
            if match[0] != b'"':
                return match[0].decode()
            self._in_string = True

    def _skip_string(self) -> bool:
        """Scan to the end of the string in progress; return whether it has been found."""
        match = _IN_STRING.match(self._buffer, self._at)
        assert match is not None
        self._at = match.end()  # before a backslash whose character has not arrived, too
        following = self._buffer[self._at : self._at + 1]
        if following == b"\n":
            raise BrokenStream(f"a line ends within a string at byte {self._base + self._at}")
        if following != b'"':
            return False
        self._at += 1
        self._in_string = False
        return True

    def _take(self, token: str) -> Iterator[tuple[int, bytes]]:
        here = self._at - 1
        if token in "[{":
            if token == "[" and not self._depth and not self._in_array:
                yield from self._value(here)
                self._in_array, self._start = True, self._at
            else:
                self._depth += 1
        elif self._depth:
            if token != ",":
                self._depth -= 1
                if not self._depth and not self._in_array:
                    yield from self._value(self._at)
        elif token == "}" or (token == "]" and not self._in_array):
            raise BrokenStream(f"a '{token}' that closes nothing at byte {self._base + here}")
        else:
            yield from self._value(here)
            self._start = self._at
            self._in_array = self._in_array and token == ","

    def _value(self, stop: int) -> Iterator[tuple[int, bytes]]:
        text = bytes(self._buffer[self._start : stop])
        offset, self._start = self._base + self._start, stop
        if text.strip():
            yield offset, text
