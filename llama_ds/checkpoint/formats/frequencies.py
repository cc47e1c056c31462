"""Stored rotary frequencies: old exports and releases have them as tensors, although they follow from rope_theta."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llama_ds.checkpoint.formats.inventory import some_tensors
from llama_ds.checkpoint.stored import Stored
from llama_ds.config.schema import ModelConfig

# Releases store them in bf16 or fp16: half a unit in the last place of bf16 is 2^-9, and fp16 has steps of 6e-8 below
# its normal range. Another published theta changes the last frequency by a factor of 2 at least.
RTOL, ATOL = 1e-2, 1e-7


def dropped_frequencies(path: str, stored: Mapping[str, Stored], model: ModelConfig, config: str) -> list[str]:
    """Return the lines that report dropped frequencies; `config` is the file that rope_theta is from.

    Neither transformers nor Meta's code computes with the stored values, so different ones are reported, not refused.
    """
    if not stored:
        return []
    lines = [f"{path}: {some_tensors(list(stored))} rotary frequencies, which follow from rope_theta: dropped"]
    wanted = model.rope_theta ** -(torch.arange(0, model.head_dim, 2).double() / model.head_dim)
    for name, tensor in stored.items():
        found = torch.empty(tensor.shape, dtype=tensor.dtype)
        tensor.read(found)
        if not _agree(found, wanted) and model.rope_scaling is None:
            lines.append(
                f"warning: {path}: the frequencies {name} are not those of rope_theta = {model.rope_theta:g} in "
                f"{config}, which is used{_theta_of(found, model.head_dim)}; compare {config} with the release's"
            )
            break
    return lines


def _agree(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found.double(), wanted, rtol=RTOL, atol=ATOL)


def _theta_of(found: Tensor, head_dim: int) -> str:
    """Return the theta that the second frequency, theta^(-2/K), implies, in words."""
    if found.ndim != 1 or len(found) < 2 or not 0 < float(found[1]) < 1:
        return ""
    return f" (they suit a theta of about {float(found[1]) ** (-head_dim / 2):.1g})"
