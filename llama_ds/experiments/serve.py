"""A report that follows its runs: served on this machine's loopback, made again when a run has written more."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from llama_ds.config.run_files import MACHINES, METRICS, RUN_FILE
from llama_ds.errors import UserError

HOST = "127.0.0.1"
Files = tuple[tuple[str, int, int], ...]  # name, size and time of each


class ReportServer(ThreadingHTTPServer):
    """Answers GET / and GET /page with the report."""

    daemon_threads = True

    def __init__(self, port: int, folders: Sequence[str], make: Callable[[], str]) -> None:
        """Listen on `port`, 0 for any; `make` returns the page of the folders as they are now.

        Raises:
            UserError: the port is taken, or not for this user.
        """
        self._folders, self._make = folders, make
        self._lock = threading.Lock()
        self._made: tuple[tuple[Files, ...], bytes] = ((), b"")
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; give another port, or 0 for any free one") from None

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def page(self) -> bytes:
        """Return the page; it is made once for each state of the files.

        Raises:
            UserError: the files of a run are gone or damaged.
        """
        with self._lock:
            state = tuple(_state(folder) for folder in self._folders)
            if state != self._made[0]:
                self._made = state, self._make().encode()
            return self._made[1]


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        if self.path not in ("/", "/page"):
            return self._answer(404, b"not found")
        try:
            return self._answer(200, self.server.page())
        except UserError as error:
            return self._answer(503, str(error).encode())

    def _answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing of each request."""


def _state(folder: str) -> Files:
    """Return names, sizes and times of the files that a report reads."""
    paths = [Path(folder, name) for name in (METRICS, MACHINES, RUN_FILE)]
    found = []
    for path in [*paths, *sorted(Path(folder).glob("jobs/*/events.jsonl"))]:
        try:
            status = os.stat(path)
        except OSError:
            continue
        found.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(found)
