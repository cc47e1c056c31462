"""Runs tools/convert.py, in forked processes of which each is killed at one of its operations in a folder.

Requests and answers are lines of JSON: {words, folder, fatal} and {code, points, error}. With `fatal` null this process
itself converts, so that it imports what the forked ones need, and answers with the points.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from commit_points import Log, Points, _path_of

from tools import convert


class ConversionPoints(Points):
    """Counts pwrite as a write, too: it writes the weights."""

    def __init__(self, folder: str, log: Log | None, fatal: str | None) -> None:
        super().__init__(folder, log, fatal)
        pwrite = os.pwrite

        def seen(file: int, data: Any, position: int) -> int:
            self._pass("write", _path_of(file))
            return pwrite(file, data, position)

        os.pwrite = seen  # type: ignore[assignment]


def converted(words: list[str]) -> tuple[int, str]:
    """Return the exit code and the text of stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        return convert.main(words), errors.getvalue()


def forked(words: list[str], folder: str, fatal: str) -> tuple[int, str]:
    """Return the same of a conversion in a child; -9 and nothing if it was killed."""
    with tempfile.NamedTemporaryFile() as file:
        if not (child := os.fork()):
            ConversionPoints(folder, None, fatal)
            Path(file.name).write_text(json.dumps(converted(words)))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return tuple(json.loads(file.read())) if code == 0 else (code, "")


def main() -> None:
    points: list[str] = []
    observed: Points | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["fatal"] is None:
            points.clear()
            observed = observed or ConversionPoints("", lambda point, time: points.append(point), None)
            observed.folder = request["folder"] + "/"
            observed.seen.clear()
            code, error = converted(request["words"])
            observed.folder = "/nowhere/"
        else:
            code, error = forked(**request)
        answer = {"code": code, "points": points, "error": error}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
