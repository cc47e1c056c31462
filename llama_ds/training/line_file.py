"""A text file of lines that loses none while the disk is full: they wait in memory until they can be written."""

from __future__ import annotations

import os


class LineFile:
    """A file to which lines are appended."""

    def __init__(self, path: str) -> None:
        """Append to `path`. Raises OSError."""
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting = bytearray()

    def write(self, line: str) -> None:
        """Append a line, after those that wait.

        Raises:
            OSError: it cannot be written now, and waits.
        """
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
