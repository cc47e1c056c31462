"""The last values of a run for Prometheus: an HTTP endpoint, and a file for node_exporter's textfile collector.

The text is Prometheus' exposition format 0.0.4. A metric `a/b` becomes `llama_ds_a_by_name{name="b"}`.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from llama_ds.atomic_files import write_atomically
from llama_ds.job.run_end import RunEnd
from llama_ds.training.boards.background import Values, numbers

TIMEOUT_S = 10.0  # for a client that sends no request


class PrometheusMetrics:
    """Gauges with the last value of each metric, the last step, and when it was reported."""

    def __init__(self, run: str, address: str, port: int, textfile: str) -> None:
        """Serve on `port` unless it is 0; write `textfile` unless it is ""."""
        self._run, self._textfile = run, textfile
        self._values: dict[str, float] = {}
        self._text = b""
        self._server = self._serve(address, port) if port else None

    def add(self, step: int, values: Values) -> None:
        self._values |= {**numbers(values), "step": step, "last_report_timestamp_seconds": time.time()}
        self._text = exposition(self._run, self._values).encode()
        if self._textfile:
            write_atomically(self._textfile, self._text)

    def close(self, end: RunEnd) -> None:
        """Stop serving and remove the file: values of a run that has ended are not current."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
        if self._textfile:
            with suppress(FileNotFoundError):
                os.remove(self._textfile)

    def _serve(self, address: str, port: int) -> ThreadingHTTPServer:
        board = self

        class Handler(BaseHTTPRequestHandler):
            timeout = TIMEOUT_S

            def do_GET(self) -> None:
                found = self.path.split("?")[0] == "/metrics"
                body = board._text if found else b"the metrics are at /metrics\n"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Keep requests off the console."""

        server = ThreadingHTTPServer((address, port), Handler)
        server.daemon_threads = True
        Thread(target=server.serve_forever, name="prometheus endpoint", daemon=True).start()
        return server


def exposition(run: str, values: Mapping[str, float]) -> str:
    """Return the gauges of `values` in the exposition format, the samples of a metric together."""
    samples: dict[str, list[str]] = {}
    for name, value in values.items():
        metric, slash, part = name.partition("/")
        metric = f"llama_ds_{re.sub('[^a-zA-Z0-9_]', '_', metric)}{'_by_name' if slash else ''}"
        labels = f'run="{_escaped(run)}"' + (f',name="{_escaped(part)}"' if slash else "")
        samples.setdefault(metric, []).append(f"{metric}{{{labels}}} {_number(value)}\n")
    return "".join(f"# TYPE {metric} gauge\n{''.join(lines)}" for metric, lines in samples.items())


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(float(value)) if math.isfinite(value) else "+Inf" if value > 0 else "-Inf"
