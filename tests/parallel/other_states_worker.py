"""Runs resume_worker.py on every rank with an optimizer that keeps no second moments for hidden matrices."""

from __future__ import annotations

from typing import Any

import torch

from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.layout.optimizer_states import ADAMW, EXP_AVG
from llama_ds.layout.weights import Role
from tests.parallel import resume_worker

MOMENTUM = 0.95


class Momentum(torch.optim.AdamW):
    """Momentum for hidden matrices, AdamW for other weights."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        _tables, hidden, _norms = self.param_groups  # `decay_groups` puts weights with the same states into a group
        hidden["momentum"] = MOMENTUM

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        all_groups = self.param_groups
        self.param_groups = [group for group in all_groups if "momentum" not in group]
        super().step()
        self.param_groups = all_groups
        for group in all_groups:
            for p in group["params"] if "momentum" in group else ():
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", torch.zeros(())) + 1
                    state[EXP_AVG] = state.get(EXP_AVG, torch.zeros_like(p)).mul_(group["momentum"]).add_(p.grad)
                    p.add_(state[EXP_AVG], alpha=-group["lr"])


def config_that_allows_it(*arguments: Any, **options: Any) -> dict[str, Any]:
    """Return the merged configuration, by which DeepSpeed takes an optimizer that it does not know."""
    return {**deepspeed_config(*arguments, **options), "zero_allow_untested_optimizer": True}


if __name__ == "__main__":
    ADAMW.moments[Role.HIDDEN_MATRIX] = (EXP_AVG,)  # type: ignore[index]
    torch.optim.AdamW = Momentum  # type: ignore[misc]
    resume_worker.deepspeed_config = config_that_allows_it
    resume_worker.main()
