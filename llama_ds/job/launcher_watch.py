"""Watches the processes that started this rank: a rank whose launcher is gone saves and ends.

Otherwise it would hold its device, and write, after the job has ended for the scheduler and the user. In jobs of
tools/launch.py the heartbeat does this.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence

import psutil

from llama_ds.job.requests import Request

CHECK_S = 1.0
_DEEPSPEED = ("deepspeed", "deepspeed.pt", "deepspeed.launcher.runner")
_ON_HOSTS = "deepspeed.launcher.launch"  # starts the ranks of a host for one of these
_LAUNCHERS = (
    *_DEEPSPEED,
    *(_ON_HOSTS, "torchrun", "torch.distributed.run", "torch.distributed.launch"),
    *("mpirun", "mpiexec", "orterun", "prterun", "orted", "prted"),  # Open MPI
    *("mpiexec.hydra", "hydra_pmi_proxy"),  # MPICH, Intel MPI
)

_SHELLS = ("sh", "bash", "dash")


def watch_launcher(ask: Callable[[Request, str], None]) -> None:
    """Ask this rank to end when one of the processes that launched it has ended. A thread checks every CHECK_S."""
    parents = psutil.Process().parents()
    names = watched([_words(parent) for parent in parents])
    found = {parent: name for parent, name in zip(parents, names, strict=True) if name}
    if found:
        threading.Thread(target=_watch, args=(found, ask), name="launcher watch", daemon=True).start()


def watched(chain: Sequence[Sequence[str]]) -> list[str]:
    """Return the launcher's name for each command line of a process's ancestors, nearest first, or "" for others.

    A shell that starts a launcher in the background may end before it, and so may a login. But if DeepSpeed's launcher
    runs on another host, the connection of ssh, which has no terminal then, is all that is here of it.
    """
    names = [_program(words) for words in chain]
    launchers = [name if name in _LAUNCHERS else "" for name in names]
    if _ON_HOSTS in launchers and not set(_DEEPSPEED) & set(launchers):
        top = max(place for place, name in enumerate(launchers) if name)
        for place in range(top + 1, len(names)):
            if names[place].startswith("sshd") and names[place].endswith("@notty"):
                launchers[place] = "ssh"
                break
    return launchers


def _program(words: Sequence[str]) -> str:
    """Return the program of a command line; for Python and shells, its script or module."""
    if not words:
        return ""
    program = os.path.basename(words[0])
    if program in _SHELLS:  # mpirun of Intel MPI is a script
        return os.path.basename(words[1]) if len(words) > 1 and not words[1].startswith("-") else program
    if not program.startswith("python"):
        return program
    rest = list(words[1:])
    while rest and rest[0].startswith("-") and rest[0] != "-m":
        rest.pop(0)
    if rest[:1] == ["-m"]:
        return rest[1] if len(rest) > 1 else ""
    return os.path.basename(rest[0]) if rest else ""


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _watch(found: dict[psutil.Process, str], ask: Callable[[Request, str], None]) -> None:
    while all(map(_lives, found)):
        time.sleep(CHECK_S)
    process, name = next((process, name) for process, name in found.items() if not _lives(process))
    ask(Request.END, f"the launcher, {name} with process id {process.pid}, is gone")


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
