"""Names of model formats and dtypes for command lines. Importing this module does not import torch."""

from __future__ import annotations

KINDS = ("deepspeed", "hf", "meta", "megatron")
DTYPE_NAMES = ("fp32", "bf16", "fp16")
TRANSFORMER_IMPLS = ("transformer_engine", "local")  # Megatron-LM's; they name the norms of a layer differently
