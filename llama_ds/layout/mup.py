"""Factors of muP (`model.mup`): what a model of width D has times that of the base model, whose width is D0.

They are those of Yang et al. (arXiv 2203.03466, table 8), relative to the base model, at whose width all of them are 1.
Sizes of attention and feed-forward count as proportional to D, so the fan-in of every hidden matrix is.

- Hidden matrices: initial standard deviation sqrt(D0 / D), AdamW's learning rate D0 / D. AdamW decays a weight by
  learning rate * weight_decay in a step, which is the same at every width: weight_decay has the factor D / D0.
- Embedding, head, norms and biases: 1.
- Logits: D0 / D.
- Attention scores: sqrt(K0 / K) beside their 1 / sqrt(K), so that they are scaled by sqrt(K0) / K for heads of size K.
- AdamW's eps: D0 / D, as all gradients, because the loss sees every weight through the logits' factor.

Muon's update of a hidden matrix has a spectral norm of its own: with the scale `jordan` it is that of the base model,
with `moonlight` it grows with sqrt(D), which the learning rate then takes back.
"""

from __future__ import annotations

import math

from llama_ds.config.schema import ModelConfig, OptimizerConfig
from llama_ds.layout.weights import Role


def inverse_width(model: ModelConfig) -> float:
    """Return D0 / D; 1 without muP. It is the factor of the logits, and of AdamW's eps."""
    return model.mup.base_width / model.hidden_size if model.mup else 1.0


def scores_factor(model: ModelConfig) -> float:
    """Return the factor of attention scores beside 1 / sqrt(K)."""
    base = model.mup.base_head_dim if model.mup else None
    return 1.0 if base is None else math.sqrt(base / model.head_dim)


def initial_factor(role: Role, model: ModelConfig) -> float:
    """Return the factor of the standard deviation of the initial weights."""
    return math.sqrt(inverse_width(model)) if role is Role.HIDDEN_MATRIX else 1.0


def rate_factor(role: Role, model: ModelConfig, optimizer: OptimizerConfig) -> float:
    """Return the factor of the learning rate, and of 1 / weight_decay."""
    if role is not Role.HIDDEN_MATRIX:
        return 1.0
    if optimizer.name == "muon":
        return math.sqrt(inverse_width(model)) if optimizer.muon_scale == "moonlight" else 1.0
    return inverse_width(model)
