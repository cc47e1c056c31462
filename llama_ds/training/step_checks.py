"""Checks of a step before the optimizer takes it, to find ranks that compute or store wrongly.

- `checkpoint.compare_replicas`: the weights of replicas must be equal (`training/replica_check.py`).
- `checkpoint.compare_repeats`: a peer computes a layer's work on a micro-batch again (`training/layer_check.py`).
- `checkpoint.compare_norms`: each rank's own gradient norm is compared with its peers'.
- `checkpoint.compare_states`: masters and moments must be as the step before has left them.

Together they cost one all-gather of a few integers a step, which synchronises with the device. Also without them, a
step is refused if replicas have different norms of the same reduced gradient (`parallel/whole_gradients.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llama_ds.config.schema import RunConfig
from llama_ds.errors import Corruption
from llama_ds.layout.layout import Layout
from llama_ds.parallel import world
from llama_ds.parallel.gradient_norms import LocalGradientNorm
from llama_ds.parallel.optimizer_state import flat_states
from llama_ds.parallel.replicas import checksum
from llama_ds.parallel.whole_gradients import NormsDiffer, different, own_norm, whole_gradients
from llama_ds.training.engines.interface import Engine
from llama_ds.training.gradient_outliers import GradientOutliers, Outlier
from llama_ds.training.layer_check import LayerCheck
from llama_ds.training.rank_names import ADVICE, MOST_NAMED, named
from llama_ds.training.replica_check import ReplicaCheck


class StepCheck(Protocol):
    """What a rank contributes to a comparison, and the verdict."""

    def before_step(self, step: int) -> None:
        """Prepare for the step that will be the `step`-th."""

    def numbers(self) -> Tensor | None:
        """Return this rank's integers, int64, None if nothing is due. Collective."""

    def judge(self, every: np.ndarray) -> list[str]:
        """Return lines to report, from the integers (R, n) of all ranks. Collective. Raises Corruption."""

    def after_step(self) -> None:
        """Take note of what the step has left."""


class StepChecks:
    """Wraps the step of a DeepSpeed engine's optimizer."""

    def __init__(
        self, run: RunConfig, layout: Layout, engine: Engine, rank: int, hosts: Sequence[str], device: torch.device
    ) -> None:
        """`hosts` are the names of all ranks' hosts in messages."""
        keys = run.checkpoint
        self._device = device
        self._checks: list[StepCheck] = []
        self.replicas = ReplicaCheck(run, layout, engine.deepspeed, hosts, device)
        if self.replicas.interval:
            self._checks.append(self.replicas)
        if keys.compare_norms and layout.dp > 1:
            self._checks.append(NormCheck(layout, engine, hosts, device))
        if keys.compare_states:
            self._checks.append(StateCheck(engine.deepspeed, hosts))
        self.layer_check: LayerCheck | None = None
        if keys.compare_repeats:
            self.layer_check = LayerCheck(keys.compare_repeats, layout, engine, rank, hosts, device)
            self._checks.append(self.layer_check)
        self._lines: list[str] = []
        optimizer = engine.deepspeed.optimizer
        self._take = optimizer.step
        self._layout, self._engine, self._hosts = layout, engine, hosts
        self._step = 0
        if self._checks or whole_gradients(engine.deepspeed):
            optimizer.step = self._checked

    def before_step(self, step: int) -> None:
        """Prepare for the step that will be the `step`-th."""
        self._step = step
        for check in self._checks:
            check.before_step(step)

    def after_step(self) -> None:
        """Take note of what the step has left."""
        for check in self._checks:
            check.after_step()

    def lines(self) -> list[str]:
        """Return what the checks report of the last step, once."""
        lines, self._lines = self._lines, []
        return lines

    def examine(self) -> None:
        """Compare. Collective.

        Raises:
            Corruption: on all ranks alike: a rank computes or stores wrongly.
        """
        due = [(check, numbers.reshape(-1)) for check in self._checks if (numbers := check.numbers()) is not None]
        if not due:
            return
        own = torch.cat([numbers.to(self._device) for _, numbers in due])  # offloaded states have theirs on the host
        every = world.gather_numbers(own.tolist(), self._device)
        ends = np.cumsum([len(numbers) for _, numbers in due])
        for (check, _), part in zip(due, np.split(every, ends[:-1], 1), strict=True):
            self._lines += check.judge(part)

    def _checked(self, *arguments: Any, **options: Any) -> Any:
        self.examine()
        try:
            result = self._take(*arguments, **options)
        except NormsDiffer:
            raise self._norms_differ() from None
        self.after_step()
        return result

    def _norms_differ(self) -> Corruption:
        """Return the error for replicas with different norms of the same gradient. Collective."""
        norms = np.array(world.gather(own_norm(self._engine.deepspeed.optimizer)))
        wrong = sorted(rank for group in self._layout.groups("dp", "cp") for rank in different(norms, group))
        wrong = wrong or list(range(len(norms)))  # the sum over tensor-parallel ranks was wrong
        shown = ", ".join("not finite" if norms[rank] < 0 else f"{norms[rank]:.5g}" for rank in wrong[:MOST_NAMED])
        return Corruption(
            f"CORRUPTION: in step {self._step} the norm of the reduced gradient of {named(wrong, self._hosts)} "
            f"is not that of the other replicas, but {shown}; the step is not taken; {ADVICE}",
            wrong,
            self._step - 1,
        )


class NormCheck:
    """Compares the norms of the ranks' own gradients."""

    def __init__(self, layout: Layout, engine: Engine, hosts: Sequence[str], device: torch.device) -> None:
        module: Any = engine.deepspeed.module
        self._norm = LocalGradientNorm(module, engine.context, layout.accumulation, device)
        self._outliers = GradientOutliers(layout.groups("dp"))
        self._hosts, self._step = hosts, 0

    def before_step(self, step: int) -> None:
        self._step = step
        self._norm.begin()

    def numbers(self) -> Tensor:
        """Return the bits of the norm."""
        return self._norm.take().double().view(1).view(torch.int64)

    def judge(self, every: np.ndarray) -> list[str]:
        found = self._outliers.judge(np.ascontiguousarray(every).view(np.float64)[:, 0])
        refused = [one for one in found if one.refused]
        if refused:
            raise Corruption(
                f"CORRUPTION: in step {self._step} {self._outlier(refused[0])}; the step is not taken; {ADVICE}",
                sorted(one.rank for one in refused),
                good_step=self._step - 1,
            )
        return [f"GRADIENT: in step {self._step} {self._outlier(one)}" for one in found[:1]]

    def after_step(self) -> None:
        """Do nothing."""

    def _outlier(self, one: Outlier) -> str:
        return (
            f"the gradient norm of {named([one.rank], self._hosts)} is {one.norm:.3g}, the median of its data-parallel "
            f"peers is {one.median:.3g}"
        )


class StateCheck:
    """Compares the sums over the bits of masters and moments with those after the step before."""

    def __init__(self, engine: Any, hosts: Sequence[str]) -> None:
        self._engine, self._hosts = engine, hosts
        self._left: Tensor | None = None
        self._step = 0
        self._good = -1  # a step whose states in memory are good: they were copied before a comparison

    def before_step(self, step: int) -> None:
        self._step = step

    def numbers(self) -> Tensor:
        """Return whether a sum has changed."""
        now = checksum(flat_states(self._engine))
        return torch.zeros_like(now[:1]) if self._left is None else (now != self._left).any().long().view(1)

    def judge(self, every: np.ndarray) -> list[str]:
        wrong = np.flatnonzero(every[:, 0]).tolist()
        if wrong:
            raise Corruption(
                f"CORRUPTION: before step {self._step} masters or moments of {named(wrong, self._hosts)} are not as "
                f"the step before has left them; the step is not taken; {ADVICE}",
                wrong,
                self._good,
            )
        self._good = self._step - 1
        return []

    def after_step(self) -> None:
        self._left = checksum(flat_states(self._engine))
