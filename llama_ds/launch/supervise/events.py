"""The event log of a job: one JSON object per line, synced to disk, and a line on the console."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


class Events:
    """The file events.jsonl of a job."""

    def __init__(self, path: Path, print_line: Callable[[str], None]) -> None:
        """Append to `path`; `print_line` receives the lines for the console."""
        self.path, self._print_line = path, print_line
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def add(self, event: str, text: str = "", **values: Any) -> None:
        """Record an event. Its text is printed even if the disk is full."""
        now = time.time()
        line = {"time": now, "at": datetime.fromtimestamp(now, timezone.utc).isoformat(timespec="milliseconds")}
        line |= {"event": event, **({"text": text} if text else {}), **values}
        if text:
            self._print_line(text)
        try:
            os.write(self._file, json.dumps(line).encode() + b"\n")
            os.fsync(self._file)
        except OSError as error:
            self._print_line(f"EVENT LOST: {self.path}: {error.strerror}: {event}")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the events of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
