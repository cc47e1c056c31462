"""Replaces environment and arguments of this process, in /proc too, where the supervisor and people look for ranks.

/proc/PID/environ and cmdline show the memory in which the kernel put both at the start of the program. A process that
was forked for a rank, instead of started, would show those of the process that forked it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping, Sequence

ROOM = "LLAMA_DS_ROOM"  # variable of spaces, for environments that are longer than the first one
ENVIRONMENT_ROOM, ARGUMENT_ROOM = 1 << 16, 1 << 12  # bytes


def restart_with_room() -> None:
    """Start this program again with room for other variables and arguments, unless it has. Call it first."""
    if ROOM not in os.environ:
        argv = [sys.executable, *sys.orig_argv[1:], " " * ARGUMENT_ROOM]
        os.execve(sys.executable, argv, os.environ | {ROOM: " " * ENVIRONMENT_ROOM})


def replace_process(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Make `environment` that of this process, and show `argv` as its command.

    Raises:
        ValueError: the environment does not fit into the memory of the first one.
    """
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()  # without the first two of proc(5)
    argv_begin, argv_end, begin, end = map(int, fields[45:49])
    block = _block([f"{name}={value}" for name, value in environment.items()])
    if len(block) > end - begin:
        raise ValueError(f"the environment has {len(block)} bytes, and there is room for {end - begin}")
    os.environ.clear()  # the C library must not point to that memory any more
    _write(begin, end, block)
    _write(argv_begin, argv_end, _block(argv)[: argv_end - argv_begin - 1])
    os.environ.update(environment)


def _block(words: Sequence[str]) -> bytes:
    return b"".join(os.fsencode(word) + b"\0" for word in words)


def _write(begin: int, end: int, content: bytes) -> None:
    # In this order, because somebody may read: the job's variable has the same place and length in all attempts.
    ctypes.memmove(begin, content, len(content))
    ctypes.memset(begin + len(content), 0, end - begin - len(content))
