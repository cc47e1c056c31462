"""Ranks forked from one process that has torch and DeepSpeed imported, which is most of what starting them takes.

    python forking.py RANKS PORT SCRIPT ARGUMENT...

The launcher of tests that look at what a run does. Like DeepSpeed's, it ends the others when a rank fails.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# What every rank imports sooner or later, in three seconds; nothing of this project.
HEAVY = ("deepspeed", "torch._dynamo", "deepspeed.runtime.zero.muon.original_muon")


def main() -> int:
    """Fork the ranks; return the exit code of the first that fails."""
    preload()
    count, port, script, *arguments = sys.argv[1:]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = {fork(script, arguments, {**common, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(int(count))}
    first = 0
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status and not first:
            first = os.waitstatus_to_exitcode(status)
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return first


def preload() -> None:
    """Import what ranks would."""
    for name in HEAVY:
        importlib.import_module(name)


def fork(script: str, arguments: Sequence[str], environment: Mapping[str, str], output: Path | None = None) -> int:
    """Start `python SCRIPT ARGUMENT...` with what is imported here, its output in a file; return its process."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    os.environ.update(environment)
    if output:
        with open(output, "wb") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    sys.exit(main())
