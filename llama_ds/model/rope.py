"""Rotary position embedding (Su 2021, equation 34) in Hugging Face's half-split layout, with Llama-3 scaling.

Shapes: B rows, T tokens, H heads, K head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama_ds.config.schema import ModelConfig, RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Return theta^(-2i/K), i < K/2, in float32, scaled for long contexts if `scaling` is given."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    return frequencies if scaling is None else scale_llama3(frequencies, scaling)


def scale_llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide low frequencies by `factor`, keep high ones, interpolate between (Llama 3.1 release, `apply_scaling`)."""
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # Weight of the unscaled frequency: 0 for waves longer than context / low, 1 for waves shorter than context / high.
    keep = ((scaling.original_max_position_embeddings / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


class RotaryTables:
    """Cosines and sines of all positions of a row, computed once per device and shared by a stage's layers."""

    def __init__(self, model: ModelConfig, seq_len: int) -> None:
        """`seq_len` is the maximum number of tokens of a row."""
        self.model = model
        self.seq_len = seq_len
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return [cos | cos] and [-sin | sin] on `device`: each (T, 1, K) in float32.

        The rotation of x is x cos + swapped(x) sin, where swapped exchanges the halves of a head.
        """
        if device not in self._tables:
            model = self.model
            frequencies = inverse_frequencies(model.head_dim, model.rope_theta, model.rope_scaling)
            angles = torch.outer(torch.arange(self.seq_len).float(), frequencies)[:, None]  # (T, 1, K/2)
            cos, sin = angles.cos(), angles.sin()
            self._tables[device] = (torch.cat([cos, cos], -1).to(device), torch.cat([-sin, sin], -1).to(device))
        return self._tables[device]


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys by their positions: (B, T, H, K) -> (B, T, H, K); rows may be shorter than the tables."""
    dtype, length = torch.promote_types(x.dtype, torch.float32), x.shape[1]
    cos, sin = (table[:length].to(dtype) for table in tables)
    wide = x.to(dtype)
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat([second, first], -1) * sin).to(x.dtype)
