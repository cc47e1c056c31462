"""Stands in for llama_ds/train.py where launchers and signals matter: it begins as that does, but imports no torch.

    python signalled_rank.py FOLDER

Each rank reports in FOLDER that it trains, then waits to be asked to end. Its save takes a second, much longer than
mpirun leaves its children.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama_ds.job.launcher_watch import watch_launcher
from llama_ds.job.own_session import leave_session_of_mpirun
from llama_ds.job.requests import RANK_VARIABLES, Request, Requests, Stage

SAVE_S = 1.0


def main() -> None:
    """Run one rank."""
    requests = Requests()
    leave_session_of_mpirun()
    requests.listen()
    watch_launcher(requests.ask)
    folder = Path(sys.argv[-1])
    rank = next(os.environ[name] for name in RANK_VARIABLES if name in os.environ)
    requests.keep()
    write(folder / f"trains_{rank}", str(os.getpid()))
    while requests.take() < Request.END:
        time.sleep(0.02)
    time.sleep(SAVE_S)
    write(folder / f"saved_{rank}", requests.reason)
    while not all((folder / f"saved_{other}").exists() for other in range(2)):  # the barrier at the end of a run
        time.sleep(0.02)
    requests.enter(Stage.FINISHED)
    os._exit(130 if requests.take() is Request.INTERRUPT else 0)


def write(path: Path, text: str) -> None:
    """Write a file that is complete when it appears."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


main()
