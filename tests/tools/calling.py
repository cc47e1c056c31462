"""Calls of tools from the warm process of the test session (`tests/warm.py`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0
# As a shell starts a tool: stdout is buffered, so that what is left of it is written at the end.
ENVIRONMENT = os.environ | warm.SETTINGS | {"PYTHONUNBUFFERED": ""}


@dataclass
class Finished:
    """Exit code and output of a finished call."""

    code: int
    out: str
    err: str


@dataclass
class Started:
    """A running call, whose output goes to files."""

    process: warm.Process
    out: Path
    err: Path

    def finish(self) -> Finished:
        """Wait for the end."""
        try:
            code = self.process.wait(TIMEOUT_S)
        finally:
            self.process.kill()
        return Finished(code, self.out.read_text() if self.out.exists() else "", self.err.read_text())


class Tools:
    """Calls scripts of the project; calls may run side by side, because each has files of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._calls = folder, 0

    def start(self, script: str, *arguments: object, closed: bool = False) -> Started:
        """Start a script; with `closed`, nobody reads the pipe that is its stdout."""
        self._calls += 1
        out, err = (self._folder / f"{self._calls}.{name}" for name in ("out", "err"))
        if closed:
            reader, writer = os.pipe()
            os.close(reader)
        with os.fdopen(writer, "wb") if closed else out.open("wb") as stdout, err.open("wb") as stderr:
            words = [ROOT / script, *arguments]
            return Started(warm.start(words, stdout, stderr=stderr, environment=ENVIRONMENT), out, err)

    def call(self, script: str, *arguments: object, closed: bool = False) -> Finished:
        """Start a script and wait for its end."""
        return self.start(script, *arguments, closed=closed).finish()
