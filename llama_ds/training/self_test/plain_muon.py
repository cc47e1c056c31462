"""Muon with whole matrices on one rank, written here once more from its paper: what every layout must compute."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llama_ds.config.schema import ModelConfig, OptimizerConfig


class PlainMuon:
    """Muon for the matrices of `hidden`, in their dtype."""

    def __init__(self, hidden: Iterable[nn.Parameter], settings: OptimizerConfig, model: ModelConfig) -> None:
        self.settings = settings
        self.factor = 1.0  # factor of the learning rate: updates of wider models then have one spectral norm
        if model.mup and settings.muon_scale == "moonlight":
            self.factor = (model.mup.base_width / model.hidden_size) ** 0.5
        self.momenta = {p: torch.zeros_like(p) for p in hidden}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update by the gradients; `lr` is the schedule's rate for a peak of `settings.lr`."""
        settings = self.settings
        decay = lr * (settings.muon_lr or settings.lr) / settings.lr * settings.weight_decay
        lr *= self.factor * (settings.muon_lr or settings.lr) / settings.lr
        for p, momentum in self.momenta.items():
            assert p.grad is not None
            momentum.mul_(settings.momentum).add_(p.grad)
            n, m = p.shape
            update = newton_schulz(p.grad + settings.momentum * momentum if settings.nesterov else momentum)
            scale = 0.2 * max(n, m) ** 0.5 if settings.muon_scale == "moonlight" else max(1, n / m) ** 0.5
            p.mul_(1 - decay).sub_(lr * scale * update)


def newton_schulz(g: Tensor) -> Tensor:
    """Return X after five steps of X <- (a I + b X X^T + c (X X^T)^2) X, from X = G / |G|."""
    x = g / g.norm()
    if len(x) > len(x.t()):
        return newton_schulz(g.t()).t()
    eye = torch.eye(len(x), dtype=x.dtype)
    for _ in range(5):
        gram = x @ x.t()
        x = (3.4445 * eye - 4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x
