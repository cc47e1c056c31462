"""Ends a run whose data-parallel replicas hold different weights or gradients, before a step is taken or saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_ds.config.schema import RunConfig
from llama_ds.errors import Corruption
from llama_ds.layout.layout import Layout
from llama_ds.parallel import world
from llama_ds.parallel.pipeline_optimizer import PipelineOptimizer
from llama_ds.parallel.replicas import checksum, vote
from llama_ds.parallel.whole_gradients import whole_gradients
from llama_ds.training.rank_names import ADVICE, named


class ReplicaCheck:
    """Compares weights every `checkpoint.compare_replicas` steps and before each save.

    One of the checks of `training/step_checks.py`: the weights that a step has computed with must be equal before it is
    taken, and so must reduced gradients where every replica holds them whole. Under ZeRO-3 no rank holds whole weights,
    and without replicas there is nothing to compare: then it does nothing.
    """

    def __init__(self, run: RunConfig, layout: Layout, engine: Any, hosts: Sequence[str], device: torch.device) -> None:
        """`engine` is DeepSpeed's; `hosts` are the names of all ranks' hosts in messages."""
        self._engine, self._device, self._hosts = engine, device, hosts
        comparable = layout.data_axis > 1 and run.zero_stage < 3
        self.interval = run.checkpoint.compare_replicas if comparable else 0
        self._groups = layout.groups("dp", "cp")
        self._step = 0
        self._good = -1  # a step whose states in memory are good: they were copied before a comparison

    def before_step(self, step: int) -> None:
        """Take note of the step that will be the `step`-th."""
        self._step = step

    def numbers(self) -> Tensor | None:
        """Return two sums over the bits of this rank's weights, and of its gradients, if a comparison is due."""
        if self._step % self.interval:
            return None
        tensors = self._engine.module.parameters(), whole_gradients(self._engine)
        return torch.cat([checksum(some).to(self._device) for some in tensors])

    def judge(self, every: np.ndarray) -> list[str]:
        """Compare the sums (R, 4) of all ranks.

        Raises:
            Corruption: on all ranks alike: replicas differ.
        """
        self._compare(every[:, :2], f"in step {self._step} the weights", "taken")
        self._good = self._step - 1
        self._compare(every[:, 2:], f"in step {self._step} the reduced gradients", "taken")
        return []

    def after_step(self) -> None:
        """Do nothing: the weights may still travel."""

    def before_save(self, done: int) -> None:
        """Compare the weights after `done` steps. Collective.

        Raises:
            Corruption: on all ranks alike: replicas differ.
        """
        if not self.interval:
            return
        optimizer = self._engine.optimizer
        if isinstance(optimizer, PipelineOptimizer):  # the next forward would wait for the weights of other replicas
            optimizer.finish()
        sums = checksum(self._engine.module.parameters())
        self._compare(world.gather_numbers(sums.tolist(), self._device), f"after step {done} the weights", "saved")
        self._good = done - 1

    def _compare(self, sums: np.ndarray, what: str, verb: str) -> None:
        wrong = sorted(rank for group in self._groups for rank in vote(sums, group))
        if wrong:
            minority = not any(set(group) <= set(wrong) for group in self._groups)
            whose = "differ from those of the other replicas" if minority else "differ from each other"
            raise Corruption(
                f"CORRUPTION: {what} of {named(wrong, self._hosts)} {whose}; the step is not {verb}; {ADVICE}",
                wrong,
                self._good,
            )
