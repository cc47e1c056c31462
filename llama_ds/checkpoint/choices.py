"""The names by which people choose a model's format and dtype; without torch, for command lines."""

from __future__ import annotations

KINDS = ("deepspeed", "hf", "meta")
DTYPE_NAMES = ("fp32", "bf16", "fp16")
