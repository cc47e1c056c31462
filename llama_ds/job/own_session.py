"""Keeps a rank of an MPI alive while it saves.

mpirun of Open MPI 5 answers SIGTERM, SIGINT and SIGHUP with SIGTERM to its ranks, and SIGKILL 0.2 s later; no option
changes it. Hydra's proxies, of MPICH and Intel MPI, kill their ranks as soon as mpirun is gone, as it is after SIGHUP.
No checkpoint is written in that time. Therefore what they start only passes signals on to a child in a session of its
own, which is the rank.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import suppress

from llama_ds.job.requests import WARNINGS

# Variables that a rank has from Open MPI's mpirun, MPICH's and Intel MPI's. srun sets PMI_RANK, but none of them.
_OF_MPIRUN = ("OMPI_COMM_WORLD_RANK", "HYDI_CONTROL_FD", "HYDRA_BSTRAP_UPSTREAM_FD")
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *WARNINGS)


def leave_session_of_mpirun(environment: Mapping[str, str] = os.environ) -> None:
    """Return in a child process if an mpirun started this one, which then ends as the child does.

    Call it before threads start.
    """
    if not any(name in environment for name in _OF_MPIRUN):
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
