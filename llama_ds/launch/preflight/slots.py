"""Starts the processes that measure a host, one for each slot, and prints their measurements as JSON.

`measure.py` runs it on each host with one JSON argument. It does not import torch, which only its processes need.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys


def main() -> None:
    """Run as the host process."""
    plan = json.loads(sys.argv[1])
    code = f"import sys; sys.path.insert(0, {sys.path[0]!r}); from llama_ds.parallel.burn import main; main()"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(plan | {"slot": slot})],
            stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for slot in range(plan["slots"])
    ]  # fmt: skip
    lines = [process.communicate()[0].strip().splitlines() for process in started]
    print("<burn>" + json.dumps([json.loads(found[-1]) if found else None for found in lines]) + "</burn>")
