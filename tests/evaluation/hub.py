"""A server with as much of the Hugging Face hub's HTTP interface as its client uses to list and download a data set."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def served(repository: str, revision: str, files: Mapping[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serve the files of one revision of a data set; yield the hub's address, and the paths asked for so far.

    The list of files has two pages, as long ones have.
    """
    tree, resolve = f"/api/datasets/{repository}/tree/{revision}", f"/datasets/{repository}/resolve/{revision}/"
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            asked.append(f"{self.command} {path}")
            if path == tree:
                names = sorted(files)
                page = names[len(names) // 2 :] if "cursor" in url.query else names[: len(names) // 2]
                entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": COMMIT} for name in page]
                link = {} if "cursor" in url.query else {"Link": f'<{address}{url.path}?cursor=2>; rel="next"'}
                self._answer(json.dumps(entries).encode(), {"Content-Type": "application/json", **link})
            elif path.startswith(resolve) and path.removeprefix(resolve) in files:
                content = files[path.removeprefix(resolve)]
                self._answer(content, {"ETag": f'"{sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET

        def _answer(self, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, asked
    finally:
        server.shutdown()
        server.server_close()
