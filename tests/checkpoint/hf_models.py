"""Small models of transformers, for conversions from and to other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE: dict[str, Any] = {
    "intermediate_size": 88,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


def saved_llama(folder: Path, **shape: Any) -> LlamaForCausalLM:
    """Return a random model, saved in `folder`, which its `name_or_path` names."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | shape)).eval()
    model.name_or_path = str(folder)
    model.save_pretrained(folder)
    return model
