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

# Set by Open MPI's mpirun, and by Hydra (the mpirun of MPICH and Intel MPI). srun sets PMI_RANK, but neither of them.
_OF_MPIRUN = ("OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")
_starter = 0  # process id of what started the process whose child this is
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *WARNINGS)


def starter() -> int:
    """Return the process id of what has started this rank; Hydra and DeepSpeed start all ranks of a host by one."""
    return _starter or os.getppid()


def leave_session_of_mpirun(environment: Mapping[str, str] = os.environ) -> None:
    """Return in a child process if an mpirun started this one, which then ends as the child does.

    Call it before threads start.
    """
    if not any(name in environment for name in _OF_MPIRUN):
        return
    global _starter
    _starter = os.getppid()
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
