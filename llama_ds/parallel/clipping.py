"""Clipping as a divisor of the gradients."""

from __future__ import annotations

from torch import Tensor

CLIP_EPS = 1e-6  # same as torch.nn.utils.clip_grad_norm_ and DeepSpeed


def grad_scale(norm: Tensor, clip: float) -> Tensor:
    """Return by what gradients of this global norm are divided: 1 unless the norm exceeds `clip`."""
    return ((norm + CLIP_EPS) / clip).clamp(min=1.0)
