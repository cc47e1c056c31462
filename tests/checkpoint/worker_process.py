"""A worker script as a process of its own, which is asked by lines of JSON and dies of the wanted kills only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
Ask = Callable[[dict[str, Any]], dict[str, Any]]


@contextmanager
def worker_process(script: str) -> Iterator[Ask]:
    """Start a script beside this file; yield a function that returns its answer to a request."""
    command = [sys.executable, str(Path(__file__).with_name(script))]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as worker:
        assert worker.stdin and worker.stdout

        def ask(request: dict[str, Any]) -> dict[str, Any]:
            assert worker.stdin and worker.stdout
            print(json.dumps(request), file=worker.stdin, flush=True)
            line = worker.stdout.readline()
            assert line, "the worker has ended: see its stderr"
            answer: dict[str, Any] = json.loads(line)
            return answer

        yield ask
        worker.stdin.close()
