"""A web server on 127.0.0.1 with programmable faults."""

from __future__ import annotations

import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

HANG_S = 20.0  # maximum duration of a stalled response


class FlakyServer:
    """Serves `files` by path, such as "/a/b.tar".

    `faults[path]` yields one fault per request; None, or the end of the iterator, means no fault. A number is the
    status of the response; "hang" and "stall" stop before and in the middle of it, "cut" closes the connection in the
    middle, "corrupt" changes the last byte, "short" and "long" serve another length, and "lie" labels a range as one
    from byte 0.
    """

    def __init__(self, files: dict[str, bytes], ranges: bool = True) -> None:
        self.files, self.ranges = files, ranges
        self.faults: dict[str, Iterator[int | str | None]] = {}
        self.requests: list[tuple[str, str | None, str | None]] = []  # path, Range, Authorization
        self.reached, self.ended = threading.Event(), threading.Event()  # a request has stalled; the server has ended
        handler = type("Handler", (Handler,), {"flaky": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> FlakyServer:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()

    def ranges_of(self, path: str) -> list[str | None]:
        """Return the Range of each request for a path."""
        return [asked for requested, asked, _ in self.requests if requested == path]


class Handler(BaseHTTPRequestHandler):
    flaky: FlakyServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        flaky = self.flaky
        asked = self.headers.get("Range")
        path = urllib.parse.unquote(self.path)
        flaky.requests.append((path, asked, self.headers.get("Authorization")))
        fault = next(flaky.faults.get(path, iter(())), None)
        content = flaky.files.get(path)
        if fault == "hang":
            self.hang()
            return
        if isinstance(fault, int) or content is None:
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        content = {"short": content[:-7], "long": content + b"more"}.get(str(fault), content)
        self.answer(content, asked, fault)

    def answer(self, content: bytes, asked: str | None, fault: str | int | None) -> None:
        start = int(re.sub(r"bytes=(\d+)-", r"\1", asked)) if asked and self.flaky.ranges else 0
        if start >= len(content) > 0:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            first = 0 if fault == "lie" else start
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        with suppress(BrokenPipeError, ConnectionResetError):  # a client may read the headers, or the beginning, alone
            self.wfile.write(body[: len(body) // 2] if fault in ("stall", "cut") else body)
            self.wfile.flush()
        if fault == "stall":
            self.hang()

    def hang(self) -> None:
        self.flaky.reached.set()
        self.flaky.ended.wait(HANG_S)
