"""Keeps a rank of Open MPI alive while it saves.

mpirun answers SIGTERM, SIGINT and SIGHUP with SIGTERM to its ranks, and SIGKILL 0.2 s later (Open MPI 5; no option
changes it). No checkpoint is written in that time. Therefore what mpirun starts only passes signals on to a child in a
session of its own, which is the rank.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import suppress

from llama_ds.job.requests import WARNINGS

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *WARNINGS)


def leave_session_of_mpirun(environment: Mapping[str, str] = os.environ) -> None:
    """Return in a child process if Open MPI started this one, which then ends as the child does.

    Call it before threads start.
    """
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    child = os.fork()
    if not child:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return

    def pass_on(number: int, _: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)
