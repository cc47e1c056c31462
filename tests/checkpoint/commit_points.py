"""Observes the operations of a process in a folder, and kills the process at one of them.

A point is the moment before an operation, named "operation path" with the path relative to the folder. The second
point of the same name is "... #2", and so on. A write has another point when half of its bytes are written ("torn").
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

# Python's audit events for operations that change a folder or open a file.
OPERATIONS = {"open": "open", "os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "remove", "os.rmdir": "rmdir"}
# Positions in an event's arguments: the path, and the descriptor of its folder (None: the event has none).
ARGUMENTS = {"open": (0, None), "os.mkdir": (0, 2), "os.rename": (0, 2), "os.remove": (0, 1), "os.rmdir": (0, 1)}


def without_writes(points: list[str]) -> tuple[list[str], list[list[str]]]:
    """Return the points other than writes, and the writes grouped by file."""
    writes: dict[str, list[str]] = {}
    for point in points:
        if point.startswith("write"):
            writes.setdefault(point.split()[1], []).append(point)
    return [point for point in points if not point.startswith("write")], list(writes.values())


Log = Callable[[str, int], None]  # (point, time in ns of the monotonic clock)


class Points:
    """Reports this process's operations in `folder` to `log`, and kills the process at the point `fatal`."""

    def __init__(self, folder: str, log: Log | None, fatal: str | None) -> None:
        self.folder, self.log, self.fatal = folder + "/", log, fatal
        self.seen: Counter[str] = Counter()
        self._write, self._fsync = os.write, os.fsync
        os.write, os.fsync = self._seen_write, self._seen_fsync  # type: ignore[assignment]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS:
            at, base = ARGUMENTS[event]
            path, number = arguments[at], -1 if base is None else arguments[base]
            if isinstance(path, str):
                path = path if number == -1 else os.path.join(_path_of(number), path)
                self._pass(OPERATIONS[event], path)

    def _seen_write(self, file: int, data: Any) -> int:
        path = _path_of(file)
        if self._pass("write", path) and self.fatal == self._name("torn", path, count=False):
            self._write(file, memoryview(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return self._write(file, data)

    def _seen_fsync(self, file: int) -> None:
        path = _path_of(file)
        self._pass("fsync", path)
        self._fsync(file)
        if path.startswith(self.folder) or path + "/" == self.folder:
            self._report(f"synced {self._within(path)}")

    def _pass(self, operation: str, path: str) -> bool:
        if not path.startswith(self.folder) and path + "/" != self.folder:
            return False
        name = self._name(operation, path)
        self._report(name)
        if name == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    def _report(self, point: str) -> None:
        if self.log:
            self.log(point, time.monotonic_ns())

    def _name(self, operation: str, path: str, count: bool = True) -> str:
        """Return a point's name. A torn write has the number of its write."""
        within = self._within(path)
        numbered = f"{'write' if operation == 'torn' else operation} {within}"
        self.seen[numbered] += count
        number = self.seen[numbered]
        return f"{operation} {within}" + (f" #{number}" if number > 1 else "")

    def _within(self, path: str) -> str:
        return path.removeprefix(self.folder) if path.startswith(self.folder) else "."


def _path_of(file: int) -> str:
    return os.readlink(f"/proc/self/fd/{file}")
