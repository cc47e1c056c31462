"""AdamW and Lion: optimizers that update every element by itself, whatever elements of the model a rank holds.

With the clipped gradient g of a weight w, in one step:

    AdamW (Loshchilov and Hutter, arXiv 1711.05101)         Lion (Chen et al., arXiv 2302.06675, algorithm 2)
    m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2        u = sign(b1 m + (1 - b1) g)
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)     m <- b2 m + (1 - b2) g
    w <- w - lr (u + weight_decay w)                        w <- w - lr (u + weight_decay w)

The sign of 0 is 0: a weight without a gradient keeps its value, apart from its decay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama_ds.config.schema import OptimizerConfig
from llama_ds.layout.optimizer_states import EXP_AVG

CHUNK = 4 << 20  # elements that are updated at once: temporaries of 16 MiB each


class Elementwise(torch.optim.AdamW):
    """Updates all groups by AdamW, which is torch's fused one, or by Lion.

    Like torch's fused AdamW it divides gradients by `grad_scale`, and changes nothing where `found_inf` is 1.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerConfig) -> None:
        super().__init__(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
        self._settings = settings

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights that have a gradient."""
        if self._settings.name != "lion":
            super().step()
            return
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self._step_of(master, group)

    def _step_of(self, master: Tensor, group: dict[str, Any]) -> None:
        self.count_step(master)
        state = self.state[master]
        if EXP_AVG not in state:
            state[EXP_AVG] = torch.zeros_like(master)
        assert master.grad is not None
        flat, grads, moments = master.view(-1), master.grad.view(-1), state[EXP_AVG].view(-1)
        for begin in range(0, master.numel(), CHUNK):
            part = slice(begin, begin + CHUNK)
            update = self._lion(self.scaled(grads[part]), moments[part], group["betas"])
            self.update(flat[part], update, group)

    def _lion(self, grad: Tensor, moment: Tensor, betas: tuple[float, float]) -> Tensor:
        """Return u, and advance the moment."""
        update = torch.lerp(grad, moment, betas[0]).sign_()
        self.replace(moment, torch.lerp(grad, moment, betas[1]))
        return update

    def count_step(self, master: Tensor) -> None:
        """Count a step of a master unless its gradient is not finite."""
        state, infinite = self.state[master], self._infinite
        state.setdefault("step", torch.zeros((), device=master.device))
        state["step"] += 1 if infinite is None else 1 - infinite.to(state["step"].device)

    def scaled(self, grad: Tensor) -> Tensor:
        """Return a gradient clipped."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        return grad if scale is None else grad / scale

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Store new values, unless the gradients of the step are not finite."""
        infinite = self._infinite
        old.copy_(new if infinite is None else torch.where(infinite > 0, old, new))

    def update(self, weight: Tensor, update: Tensor, group: dict[str, Any]) -> None:
        """Apply an update u, and weight decay."""
        lr, decay = group["lr"], group["weight_decay"]
        self.replace(weight, weight * (1 - lr * decay) - lr * update)

    @property
    def _infinite(self) -> Tensor | None:
        return getattr(self, "found_inf", None)
