"""This machine: its processor, its load, a free port."""

from __future__ import annotations

import os
import platform
import random
import socket
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Return the CPU, the number of cores and the current load of this machine."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "load_1_min": os.getloadavg()[0]}


def cpu_name() -> str:
    """Return the processor's name, or its architecture if Linux does not report a name."""
    return _cpuinfo("model name") or platform.machine()


def cpu_vendor() -> str:
    """Return the processor's vendor, such as `GenuineIntel`, or "" if Linux does not report it."""
    return _cpuinfo("vendor_id")


def free_port() -> int:
    """Return a TCP port that nobody uses, below those that systems give to connections (from 32768 on Linux).

    It may be used seconds later, when ranks have been started: one of those could have become a connection's.
    `rendezvous` runs the source of this function on other hosts.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("a thousand ports between 20000 and 32000 are in use")


def memory_left_to_group() -> int | None:
    """Return the bytes that the control group of this process may still use; None without a limit."""
    try:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    group, left = Path("/sys/fs/cgroup", own[3:].lstrip("/")), list[int]()
    for folder in (group, *group.parents):
        try:
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                left.append(int(limit) - int((folder / "memory.current").read_text()))
        except (OSError, ValueError):
            continue
    return max(0, min(left)) if left else None


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(": ")[2] for line in lines if line.startswith(key)), "")
