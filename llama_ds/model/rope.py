"""Rotary position embedding (Su 2021, equation 34) in Hugging Face's half-split layout, with scalings for longer rows.

Shapes: B rows, T tokens, H heads, K head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama_ds.config.schema import ModelConfig, RopeScaling
from llama_ds.config.section_rules import YARN_FAST, YARN_SLOW
from llama_ds.layout.mup import scores_factor
from llama_ds.model.context_parallel import ContextParallel, WholeRows, positions


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, length: int | None = None) -> Tensor:
    """Return theta^(-2i/K), i < K/2, in float32, scaled for long contexts if `scaling` is given.

    `length` is the number of tokens of a row, on which only the kind dynamic depends; None: not above the original.
    """
    if scaling is not None and scaling.rope_type == "dynamic":
        theta *= _dynamic_factor(head_dim, scaling, length or 0)
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "yarn":
        return _scale_yarn(frequencies, theta, scaling)
    return scale_llama3(frequencies, scaling)


def attention_factor(scaling: RopeScaling | None) -> float:
    """Return the factor of rotated queries and keys: 1, or that of YaRN (arXiv 2309.00071, equation 22)."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    over, under = scaling.mscale, scaling.mscale_all_dim
    logarithm = 0.1 * math.log(scaling.factor)
    return (logarithm * over + 1) / (logarithm * under + 1) if over and under else logarithm + 1


def scale_llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide low frequencies by `factor`, keep high ones, interpolate between (Llama 3.1 release, `apply_scaling`)."""
    wavelength = 2 * math.pi / frequencies
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None and high is not None and original is not None, "checked with the section"
    # Weight of the unscaled frequency: 0 for waves longer than context / low, 1 for waves shorter than context / high.
    keep = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def _dynamic_factor(head_dim: int, scaling: RopeScaling, length: int) -> float:
    """Return the factor of theta for rows of `length` tokens: 1 up to the original length."""
    original = scaling.original_max_position_embeddings
    assert original is not None, "checked with the section"
    stretch = scaling.factor * max(length, original) / original - (scaling.factor - 1)
    return float(stretch ** (head_dim / (head_dim - 2)))


def _scale_yarn(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Divide frequencies of few rotations by `factor`, keep those of many (arXiv 2309.00071, section 3.2).

    The weight of the unscaled frequency falls linearly in the index i between the two numbers of rotations.
    """
    dim, original = 2 * len(frequencies), scaling.original_max_position_embeddings
    assert original is not None, "checked with the section"

    def index(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    start, end = index(scaling.beta_fast or YARN_FAST), index(scaling.beta_slow or YARN_SLOW)
    if scaling.truncate is not False:
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, dim - 1)
    end += 0.001 if start == end else 0.0  # as in transformers, against a division by zero
    keep = 1 - ((torch.arange(dim // 2).float() - start) / (end - start)).clamp(0, 1)
    return frequencies / scaling.factor * (1 - keep) + frequencies * keep


class RotaryTables:
    """Cosines and sines of all positions of a row, computed once per device and shared by a stage's layers."""

    def __init__(self, model: ModelConfig, seq_len: int, cp: ContextParallel | None = None) -> None:
        """`seq_len` is the maximum number of tokens of a row. If `cp` ranks share rows, tables are of own tokens."""
        self.model = model
        self.seq_len = seq_len
        self.cp = cp or WholeRows()
        scaling = model.rope_scaling
        self._by_length = scaling is not None and scaling.rope_type == "dynamic"
        self._tables: dict[tuple[torch.device, int, int], tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Return [cos | cos] and [-sin | sin] on `device`: each (T, 1, K) in float32, for this rank's `length` tokens.

        The rotation of x is x cos + swapped(x) sin, where swapped exchanges the halves of a head. T is that length if
        the frequencies depend on it, else the next power of two up to `seq_len`: a model for a million tokens has small
        tables for a prompt.
        """
        if length is None:
            length = self.seq_len // self.cp.size
        elif not self._by_length and self.cp.size == 1:
            length = min(self.seq_len, 1 << (length - 1).bit_length())
        key = device, length, self.cp.size  # the size changes where ranks have rows of their own
        if key not in self._tables:
            cos, sin = self._compute(length)
            self._tables[key] = cos.to(device), sin.to(device)
        return self._tables[key]

    def _compute(self, length: int) -> tuple[Tensor, Tensor]:
        model = self.model
        # muP's factor of the scores is half on queries and half on keys, which all attention backends then compute.
        factor = attention_factor(model.rope_scaling) * math.sqrt(scores_factor(model))
        tokens = length * self.cp.size
        frequencies = inverse_frequencies(model.head_dim, model.rope_theta, model.rope_scaling, tokens)
        own = torch.arange(tokens) if self.cp.size == 1 else positions(tokens, self.cp, self.cp.rank)
        angles = torch.outer(own.float(), frequencies)[:, None]  # (T, 1, K/2)
        cos, sin = angles.cos(), angles.sin()
        if factor != 1:
            cos, sin = cos * factor, sin * factor
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys by their positions: (B, T, H, K) -> (B, T, H, K); rows may be shorter than the tables."""
    dtype, length = torch.promote_types(x.dtype, torch.float32), x.shape[1]
    cos, sin = (table[:length].to(dtype) for table in tables)
    wide = x.to(dtype)
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat([second, first], -1) * sin).to(x.dtype)
