"""Names of model formats and dtypes for command lines. Importing this module does not import torch."""

from __future__ import annotations

KINDS = ("deepspeed", "hf", "meta", "megatron", "neox", "torchtitan")
DTYPE_NAMES = ("fp32", "bf16", "fp16")
# llama.cpp's format, and its quantized dtype, are only written. Three are read as one format.
TARGETS = ("deepspeed", "hf", "meta", "megatron", "megatron_legacy", "megatron_deepspeed", "neox", "torchtitan", "gguf")
READ_AS = {"megatron_legacy": "megatron", "megatron_deepspeed": "megatron"}
TARGET_DTYPES = (*DTYPE_NAMES, "q8_0")
# Formats that leave settings of the model open (`formats.meta_params.Unsaid`), and in words for messages.
INCOMPLETE = ("meta", "megatron", "neox", "torchtitan")
INCOMPLETE_FOLDERS = "Meta folders and those of Megatron-LM, GPT-NeoX and torchtitan"
# Results with tensor-parallel shards and with pipeline stages, in words for messages.
SHARDED = "deepspeed, meta, neox and the three of megatron"
STAGED = "deepspeed, neox and the three of megatron"
TRANSFORMER_IMPLS = ("transformer_engine", "local")  # Megatron-LM's; they name the norms of a layer differently
# Order of the rows of query, key and value in their common matrix: by heads, or all queries, keys and values of a rank.
QKV_ORDERS = ("heads", "blocks")
