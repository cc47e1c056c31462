"""Names of model formats and dtypes for command lines. Importing this module does not import torch."""

from __future__ import annotations

KINDS = ("deepspeed", "hf", "meta", "megatron")
DTYPE_NAMES = ("fp32", "bf16", "fp16")
# Only written: llama.cpp's format, and its quantized dtype.
TARGETS = (*KINDS, "gguf")
TARGET_DTYPES = (*DTYPE_NAMES, "q8_0")
TRANSFORMER_IMPLS = ("transformer_engine", "local")  # Megatron-LM's; they name the norms of a layer differently
