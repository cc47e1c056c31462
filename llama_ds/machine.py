"""Description of the machine on which a benchmark ran."""

from __future__ import annotations

import os
import platform
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


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(": ")[2] for line in lines if line.startswith(key)), "")
