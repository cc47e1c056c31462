"""The machine that something was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Return where it runs, and how busy that is."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "load_1_min": os.getloadavg()[0]}


def cpu_name() -> str:
    """Return the processor's name, or its architecture where Linux does not tell."""
    return _cpuinfo("model name") or platform.machine()


def cpu_vendor() -> str:
    """Return who made the processor, as `GenuineIntel`; empty where Linux does not tell."""
    return _cpuinfo("vendor_id")


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(": ")[2] for line in lines if line.startswith(key)), "")
