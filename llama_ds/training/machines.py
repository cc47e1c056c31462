"""On what a run was trained: machines.jsonl in its folder has a line for each start, for the model card."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from llama_ds import __version__
from llama_ds.layout.layout import Layout
from llama_ds.machine import cpu_name

MACHINES = "machines.jsonl"
PACKAGES = ("torch", "deepspeed", "flash-attn")


def machine_of(layout: Layout, device: torch.device) -> dict[str, Any]:
    """Return the number of ranks, the device of this one, and the versions of the software."""
    found = {"llama_ds": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"ranks": layout.world, "device": name, "versions": found}
