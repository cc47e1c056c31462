"""Ends a run whose data-parallel replicas hold different weights, before the step is saved."""

from __future__ import annotations

from typing import Any

import torch

from llama_ds.config.schema import RunConfig
from llama_ds.errors import Corruption
from llama_ds.layout.layout import Layout
from llama_ds.parallel import world
from llama_ds.parallel.pipeline_optimizer import PipelineOptimizer
from llama_ds.parallel.replicas import wrong_ranks


class ReplicaCheck:
    """Compares weights every `checkpoint.compare_replicas` steps and before each save.

    Under ZeRO-3 no rank holds whole weights, and without replicas there is nothing to compare: then it does nothing.
    """

    def __init__(self, run: RunConfig, layout: Layout, engine: Any, device: torch.device, host: str) -> None:
        """`engine` is DeepSpeed's; `host` is the name of this rank's host in messages."""
        self._engine, self._device, self._host = engine, device, host
        comparable = layout.data_axis > 1 and run.zero_stage < 3
        self._every = run.checkpoint.compare_replicas if comparable else 0
        self._groups = layout.groups("dp", "cp")

    def after_step(self, done: int, saves: bool) -> None:
        """Compare, if it is time to. Collective.

        Raises:
            Corruption: on all ranks alike: replicas differ.
        """
        if not self._every or not (saves or done % self._every == 0):
            return
        optimizer = self._engine.optimizer
        if isinstance(optimizer, PipelineOptimizer):  # the next forward would wait for the weights of other replicas
            optimizer.finish()
        wrong = wrong_ranks(self._engine.module.parameters(), self._groups, self._device)
        if not wrong:
            return
        hosts = world.gather(self._host)
        named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in wrong)
        whose = "differ from those of the other replicas" if self._is_minority(wrong) else "differ from each other"
        raise Corruption(
            f"CORRUPTION: after step {done} the weights of {named} {whose}; the step is not saved; test the memory and "
            "GPUs of the host, leave it out, and resume from the last checkpoint",
            wrong,
        )

    def _is_minority(self, wrong: list[int]) -> bool:
        return not any(set(group) <= set(wrong) for group in self._groups)
