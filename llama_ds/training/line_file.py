"""A text file of lines that keeps them in memory while the disk is full, until they can be written."""

from __future__ import annotations

import os

MAX_WAITING = 1 << 26  # bytes: more lines are lost


class LineFile:
    """A file to which lines are appended."""

    def __init__(self, path: str) -> None:
        """Append to `path`. Raises OSError."""
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting = bytearray()
        self.lost = 0  # lines

    def write(self, line: str) -> None:
        """Append a line, after those that wait.

        Raises:
            OSError: it cannot be written now, and waits, or is lost if `MAX_WAITING` bytes wait already.
        """
        if len(self._waiting) >= MAX_WAITING:
            self.lost += 1
            self._flush()
            self.lost -= 1
        self._waiting += line.encode() + b"\n"
        self._flush()

    def close(self) -> None:
        """Close the file. Raises OSError: lines that wait are lost."""
        try:
            self._flush()
        finally:
            os.close(self._file)

    def _flush(self) -> None:
        while self._waiting:
            del self._waiting[: os.write(self._file, self._waiting)]
