"""Imports ahead of time what DeepSpeed imports within its calls, in a process from which ranks are forked."""

from __future__ import annotations

import importlib
import os


def preload() -> None:
    """Import DeepSpeed's modules of a usual engine; CUDA is not touched."""
    for name in ("deepspeed", "deepspeed.module_inject.auto_ep_layer"):
        importlib.import_module(name)
    if os.environ.get("DS_ACCELERATOR") == "cpu":  # each engine asks what can be compiled; on CUDA it asks the device
        assert importlib.import_module("deepspeed.ops").__compatible_ops__
