"""Norms of the gradient, weights and update of every weight, and of activations, without an extra synchronisation.

Around the optimizer's step each rank adds up the squares of the elements that it holds, each element of the model on
one rank; one asynchronous all-reduce of these few numbers makes them the whole model's. A step that is not measured
costs one comparison.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama_ds.config.schema import ModelConfig
from llama_ds.layout.weights import Key, key_of, weight_of, weights
from llama_ds.parallel.activation_norms import ActivationNorms
from llama_ds.parallel.clipping import CLIP_EPS
from llama_ds.parallel.early_reads import issued, reading
from llama_ds.parallel.elementwise import Elementwise
from llama_ds.parallel.muon import Muon
from llama_ds.parallel.optimizer_state import located
from llama_ds.parallel.pipeline_optimizer import PipelineOptimizer

KINDS = ("gradient", "weight", "update")
ACTIVATION = "activation"


@dataclass(frozen=True)
class _Part:
    """Elements of a master that belong to one weight, and the number of that weight."""

    begin: int
    count: int
    number: int


class Sums:
    """The sums of squares of one step, while ranks still add them up."""

    def __init__(
        self, keys: Sequence[Key], squares: Tensor, layers: Sequence[Key], activations: Tensor, clip: float | None
    ) -> None:
        """`squares` is (3, n): `KINDS` of the n `keys`; the gradient is already clipped to `clip`. Collective.

        `activations` is (2, L): squares and numbers of the elements behind the L `layers`.
        """
        self._keys, self._layers, self._clip = keys, layers, clip
        self._all = torch.cat([squares.view(-1), activations.view(-1)])
        self._work = dist.all_reduce(self._all, async_op=True) if dist.is_initialized() else None
        self._ready = issued(self._all.device)

    def wait(self, grad_norm: Tensor | float) -> dict[str, dict[Key, float]]:
        """Return the norms by kind and weight, gradients before clipping, and the root mean squares behind the layers.

        `grad_norm` is the step's global one, known by the time of `__init__`. Synchronises.
        """
        with reading(self._all.device, self._ready):
            if self._work is not None:
                self._work.wait()
            every, grad_norm = self._all.double().cpu(), float(grad_norm)
        weights, activations = every[: -2 * len(self._layers)], every[-2 * len(self._layers) :].view(2, -1)
        norms = weights.view(len(KINDS), -1).sqrt().tolist()
        if self._clip:
            clipped = max(1.0, (grad_norm + CLIP_EPS) / self._clip)
            norms[0] = [norm * clipped for norm in norms[0]]
        found = {kind: dict(zip(self._keys, row, strict=True)) for kind, row in zip(KINDS, norms, strict=True)}
        mean_squares = activations[0] / activations[1]
        return found | {ACTIVATION: dict(zip(self._layers, mean_squares.sqrt().tolist(), strict=True))}


class LayerNorms:
    """Measures the steps of one DeepSpeed engine; `measure` arms the next step."""

    def __init__(self, engine: Any, model: ModelConfig) -> None:
        self._engine = engine
        self._keys = [key for key, _ in weights(model)]
        self._number = {key: number for number, key in enumerate(self._keys)}
        self._armed = False
        self._parts: dict[int, list[_Part]] = {}  # by id of the master
        self._squares = torch.zeros(0)
        self._activations = ActivationNorms(engine.module, model.num_hidden_layers)
        optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._optimizer, self._step = optimizer, optimizer.step
        # DeepSpeed calls it once a step, or once for every group; both with the groups in optimizer.param_groups.
        optimizer.step = self._measured_step

    def measure(self) -> None:
        """Measure the next step, which waits for its norm: an update must not be measured twice."""
        if isinstance(self._engine.optimizer, PipelineOptimizer):
            self._engine.optimizer.settle_next()
        self._armed = True
        self._squares = torch.zeros(len(KINDS), len(self._keys), device=self._engine.device)
        self._parts = defaultdict(list)
        self._activations.begin(self._engine.device)
        for parameter, name, (master, begin, count, _) in located(self._engine):
            if self._is_counted(parameter, name):
                self._parts[id(master)].append(_Part(begin, count, self._number[key_of(name)]))

    def sums(self) -> Sums:
        """Return the sums of the measured step, and begin to add them up over the ranks. Collective."""
        self._armed = False
        raw = isinstance(self._engine.optimizer, PipelineOptimizer)
        clip = None if raw else self._engine.gradient_clipping()
        return Sums(self._keys, self._squares, self._activations.keys, self._activations.sums(), clip)

    def _is_counted(self, parameter: nn.Parameter, name: str) -> bool:
        """Return whether this rank's elements of a weight count: those that several ranks hold count once."""
        engine = self._engine
        if getattr(parameter, "ds_pipe_replicated", False):  # a tied table, which an earlier stage holds too
            return False
        if weight_of(name).cut is None and engine.mpu.get_tensor_model_parallel_rank() > 0:
            return False
        cut_by_zero = engine.optimizer is not self._optimizer
        return cut_by_zero or engine.mpu.get_data_parallel_rank() == 0

    def _measured_step(self, *arguments: Any, **options: Any) -> Any:
        if not self._armed:
            return self._step(*arguments, **options)
        every = self._optimizer.param_groups
        # One group at a time: the copies of masters then take the memory of one. Muon exchanges all groups at once.
        turns = [every] if isinstance(self._optimizer, Muon) else [[group] for group in every]
        try:
            for groups in turns:
                self._optimizer.param_groups = groups
                masters = [p for group in groups for p in group["params"] if p.grad is not None]
                if masters:
                    self._step_of(masters)
        finally:
            self._optimizer.param_groups = every
        return None

    @torch.no_grad()
    def _step_of(self, masters: list[Tensor]) -> None:
        self._add(0, [(master, self._gradient(master)) for master in masters])
        before = [master.detach().to(torch.float32, copy=True) for master in masters]
        self._step()
        after = [master.detach().float() for master in masters]
        torch._foreach_sub_(before, after)
        self._add(1, list(zip(masters, after, strict=True)))
        self._add(2, list(zip(masters, before, strict=True)))

    def _gradient(self, master: Tensor) -> Tensor:
        if isinstance(self._optimizer, Elementwise):
            return self._optimizer.gradient(master)
        assert master.grad is not None
        return master.grad

    def _add(self, kind: int, tensors: list[tuple[Tensor, Tensor]]) -> None:
        """Add the squares of `tensors`, each shaped as the master beside it, to the weights' sums of a kind."""
        views, numbers = [], []
        for master, tensor in tensors:
            for part in self._parts[id(master)]:
                views.append(tensor.reshape(-1).narrow(0, part.begin, part.count))
                numbers.append(part.number)
        if views:
            squares = torch.stack(torch._foreach_norm(views)).float().square().to(self._squares.device)
            where = torch.tensor(numbers, device=self._squares.device)
            self._squares[kind].index_add_(0, where, squares)
