"""A process that has imported what tools import, and forks one for every call: no call starts Python anew.

A call ends as a script does, but for the shutdown of what was imported, which takes seconds: it flushes what was
printed, which fails aloud where nobody reads it, and exits.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    *("llama_ds.benchmarks.compare", "llama_ds.benchmarks.evaluation", "llama_ds.benchmarks.generation"),
    *("llama_ds.checkpoint.conversion.convert", "llama_ds.training.loop", "llama_ds.training.dry_run.run"),
    *("torch._dynamo", "deepspeed.runtime.zero.muon.original_muon", "transformers.models.llama.tokenization_llama"),
)
CLOSED = "closed"  # in place of a file: a pipe that nobody reads


@dataclass
class Finished:
    """What a call left."""

    code: int
    out: str
    err: str


class ForkServer:
    """The client's side. Calls may run beside one another; each writes to files of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.said = folder / "server.log"
        self._folder, self._calls = folder, 0
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        with open(self.said, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, cwd=ROOT, env=environment,
            )  # fmt: skip

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def start(self, script: str, *arguments: object, closed: bool = False) -> tuple[int, int]:
        """Begin a call of a script of the project; return its number and its process. `closed`: stdout is CLOSED."""
        self._calls += 1
        out, err = (str(self._folder / f"{self._calls}.{name}") for name in ("out", "err"))
        argv = [str(ROOT / script), *map(str, arguments)]
        return self._calls, self._ask({"argv": argv, "out": CLOSED if closed else out, "err": err})

    def finish(self, call: int, process: int) -> Finished:
        """Wait for a call."""
        code = self._ask({"wait": process})
        out, err = (self._folder / f"{call}.{name}" for name in ("out", "err"))
        return Finished(code, out.read_text() if out.exists() else "", err.read_text())

    def call(self, script: str, *arguments: object, closed: bool = False) -> Finished:
        """Call and wait."""
        return self.finish(*self.start(script, *arguments, closed=closed))

    def _ask(self, request: dict[str, object]) -> int:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.said.read_text()
        return int(answer)


def main() -> None:
    """The server's side: fork and wait as the lines of stdin ask."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # a collection in a call would copy all of it
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif not (answer := os.fork()):
            be(request["argv"], request["out"], request["err"])
        print(answer, flush=True)


def be(argv: Sequence[str], out: str, err: str) -> NoReturn:
    """Be a call."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
    if out == CLOSED:
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(writer, 1)
    os.close(writer)
    sys.argv, code = list(argv), 1
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
    except OSError:
        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    main()
