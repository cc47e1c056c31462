"""Reads the logs of an attempt: lines as they come, the last ones, and errors in them."""

from __future__ import annotations

import os
import re

LOG_LINES = 12  # number of lines shown from the end of a log
_ERROR = re.compile(r"^\s*(?:\S+: )?(error: .*)$", re.MULTILINE)  # pdsh writes the host before it


class Tail:
    """Follows a growing file, which need not exist yet."""

    def __init__(self, path: str) -> None:
        self._path, self._offset, self._rest = path, 0, b""

    def lines(self) -> list[str]:
        """Return the lines completed since the last call."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return []
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


def last_lines(path: str, count: int = LOG_LINES) -> str:
    """Return the last lines of a file, indented."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.path.getsize(path) - (1 << 16), 0))
            lines = file.read().decode(errors="replace").splitlines()[-count:]
    except OSError as error:
        lines = [str(error)]
    return "\n".join(f"    {line}" for line in lines)


def last_error(path: str) -> str:
    """Return the last error for the user in a rank's log, "" without one."""
    errors = [line.strip() for line in last_lines(path).splitlines() if line.strip().startswith("error: ")]
    return errors[-1] if errors else ""


def first_error(path: str) -> str:
    """Return the first error for the user at the end of the launcher's log, "" without one."""
    found = _ERROR.search(last_lines(path, 2 * LOG_LINES))
    return found[1] if found else ""
