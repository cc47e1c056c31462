"""AdamW and Lion: optimizers that update every element by itself, whatever elements of the model a rank holds.

With the clipped gradient g of a weight w, in step t:

    AdamW (Loshchilov and Hutter, arXiv 1711.05101)         Lion (Chen et al., arXiv 2302.06675, algorithm 2)
    m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2        u = sign(b1 m + (1 - b1) g)
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)     m <- b2 m + (1 - b2) g
    w <- w - lr (u + weight_decay w)                        w <- w - lr (u + weight_decay w)

The sign of 0 is 0: a weight without a gradient keeps its value, apart from its decay. m may be kept in bf16, rounded to
nearest; u is computed from its exact value. w may be bf16 (`bf16_masters.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama_ds.config.schema import ModelConfig, OptimizerConfig
from llama_ds.layout.layout import Layout
from llama_ds.layout.optimizer_states import CHUNK, COMPENSATION, EXP_AVG, EXP_AVG_SQ, MASTER, states_of
from llama_ds.layout.weights import Role
from llama_ds.parallel.bf16_masters import Positions, bf16_and_rest, positions_of, rounded_at_random


class Elementwise(torch.optim.AdamW):
    """Updates all groups by AdamW or by Lion. `attach` must precede the first step if masters are bf16.

    AdamW with fp32 states is torch's fused one. Like it, every rule divides gradients by `grad_scale`, and changes
    nothing where `found_inf` is 1.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerConfig, seed: int) -> None:
        """`seed` is that of stochastic rounding."""
        super().__init__(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
        self._settings, self._seed, self._states = settings, seed, states_of(settings)
        self._positions: dict[int, list[Positions]] = {}  # positions of the elements, by id of the master
        self._gradients: dict[int, Tensor] = {}  # fp32 gradients that are not the master's `grad`, by its id

    def attach(self, engine: Any, model: ModelConfig, layout: Layout) -> None:
        """Learn from DeepSpeed's `engine` what the elements of each master are. Collective."""
        if self._settings.masters == "bf16_stochastic":
            self._positions = positions_of(engine, model, layout, self._seed)
        if MASTER in self._states.bf16:
            optimizer = engine.optimizer
            masters, gradients = optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradient_flat_partition
            self._gradients = {id(m): g for m, g in zip(masters, gradients, strict=True)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights that have a gradient."""
        if self._settings.name != "lion" and not self._states.bf16:
            super().step()
            return
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self._step_of(master, group)

    def gradient(self, master: Tensor) -> Tensor:
        """Return the fp32 gradient of a master."""
        found = self._gradients.get(id(master), master.grad)
        assert found is not None
        return found

    def _step_of(self, master: Tensor, group: dict[str, Any]) -> None:
        self.begin_step(master, Role.EMBEDDING)
        rule = self._lion if self._settings.name == "lion" else self._adamw
        state, grad = self.state[master], self.gradient(master).view(-1)
        flats = {kind: tensor.view(-1) for kind, tensor in state.items() if kind != "step"}
        for begin in range(0, master.numel(), CHUNK):
            part = slice(begin, begin + CHUNK)
            chunk = {kind: flat[part] for kind, flat in flats.items()}
            update = rule(self.scaled(grad[part].float()), chunk, state["step"], group)
            self.update(master, begin, update, group)
        self.drop_copy(master)

    def drop_copy(self, master: Tensor) -> None:
        """Free DeepSpeed's copy of the gradient in the master's dtype."""
        if id(master) in self._gradients:
            master.grad = None

    def _lion(self, grad: Tensor, state: dict[str, Tensor], _: Tensor, group: dict[str, Any]) -> Tensor:
        """Return u of some elements, and advance their moment."""
        moment, (first, second) = state[EXP_AVG].float(), group["betas"]
        update = torch.lerp(grad, moment, first).sign_()
        self.replace(state[EXP_AVG], torch.lerp(grad, moment, second))
        return update

    def _adamw(self, grad: Tensor, state: dict[str, Tensor], step: Tensor, group: dict[str, Any]) -> Tensor:
        """Return u of some elements, and advance their moments."""
        first, second = group["betas"]
        average = torch.lerp(grad, state[EXP_AVG].float(), first)
        square = torch.lerp(grad.square(), state[EXP_AVG_SQ], second)
        self.replace(state[EXP_AVG], average)
        self.replace(state[EXP_AVG_SQ], square)
        taken = step.double()
        root = square.div_((1 - second**taken).float()).sqrt_().add_(group["eps"])
        return average.div_((1 - first**taken).float()).div_(root)

    def begin_step(self, master: Tensor, role: Role) -> None:
        """Make a master's states if it has none, and count the step unless its gradients are not finite."""
        state, infinite = self.state[master], self._infinite
        for kind in self._states.moments[role]:
            if kind not in state:
                state[kind] = torch.zeros_like(master, dtype=getattr(torch, self._states.dtype_name(kind)))
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

    def update(self, master: Tensor, begin: int, update: Tensor, group: dict[str, Any]) -> None:
        """Apply updates u (n,) of a master's elements from `begin` on, and weight decay."""
        lr, decay, end = group["lr"], group["weight_decay"], begin + len(update)
        weight, state = master.view(-1)[begin:end], self.state[master]
        if self._settings.masters == "fp32":
            self.replace(weight, weight * (1 - lr * decay) - lr * update)
            return
        value = weight.float()
        if COMPENSATION in state:
            rest = state[COMPENSATION].view(-1)[begin:end]
            value = value + rest.float()
        value = value * (1 - lr * decay) - lr * update
        if COMPENSATION in state:
            new, left = bf16_and_rest(value)
            self.replace(rest, left)
        else:
            new = rounded_at_random(value, begin, self._positions.get(id(master), ()), state["step"])
        self.replace(weight, new)

    @property
    def _infinite(self) -> Tensor | None:
        return getattr(self, "found_inf", None)
