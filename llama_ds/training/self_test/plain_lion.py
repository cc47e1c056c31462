"""Lion on one rank, written here once more from its paper: what every layout must compute."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from llama_ds.config.schema import OptimizerConfig


class PlainLion:
    """Lion for `parameters`, in their dtype; matrices decay, norms and biases do not.

    In a model that is `wider` than the base of muP, its `hidden` matrices have a lower rate and as much decay.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        settings: OptimizerConfig,
        hidden: Iterable[nn.Parameter] = (),
        wider: float = 1.0,
    ) -> None:
        self.settings = settings
        self.moments = {p: torch.zeros_like(p) for p in parameters}
        self.wider = dict.fromkeys(hidden, wider)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update by the gradients."""
        first, second = self.settings.betas
        for p, moment in self.moments.items():
            assert p.grad is not None
            update = torch.sign(first * moment + (1 - first) * p.grad)
            wider = self.wider.get(p, 1.0)
            if p.dim() == 2:
                update = update + self.settings.weight_decay * wider * p
            p.sub_(lr / wider * update)
            moment.mul_(second).add_((1 - second) * p.grad)
