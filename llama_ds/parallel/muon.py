"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for hidden matrices, AdamW for other weights.

With the clipped gradient G of a whole matrix W (n, m), in one step:

    M <- beta M + (1 - beta) G
    U = orthogonalised(beta M + (1 - beta) G) with Nesterov's momentum, else orthogonalised(M)
    W <- W - lr (s U + weight_decay W)

s is sqrt(max(1, n / m)) (Jordan et al.), or 0.2 sqrt(max(n, m)), with which an update is as large as AdamW's usually is
(Liu et al., arXiv 2502.16982, equation 4). Momentum is elementwise and stays where ZeRO and tensor parallelism have cut
it; only U needs whole matrices (`matrix_exchange.py`). The update is that of one rank with the whole model, whatever
the layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ds.config.schema import ModelConfig, OptimizerConfig
from llama_ds.layout.layout import Layout
from llama_ds.layout.matrix_owners import WAVES, HeldMatrix, newton_schulz_flops, owners, waves
from llama_ds.layout.optimizer_states import CHUNK, EXP_AVG
from llama_ds.layout.weights import Role, weight_of
from llama_ds.parallel.elementwise import Elementwise
from llama_ds.parallel.grid import stage_group
from llama_ds.parallel.matrix_exchange import MatrixExchange, MatrixQueue
from llama_ds.parallel.newton_schulz import orthogonalised
from llama_ds.parallel.optimizer_state import flat_groups
from llama_ds.parallel.trace import Trace


def scale_of(shape: tuple[int, int], rule: str) -> float:
    """Return s of the module's formula for a matrix (n, m)."""
    rows, columns = shape
    return 0.2 * max(rows, columns) ** 0.5 if rule == "moonlight" else max(1.0, rows / columns) ** 0.5


@dataclass(frozen=True)
class _Piece:
    """A matrix of an optimizer group, and where in the group's master this rank's elements of it are."""

    matrix: HeldMatrix
    begin: int
    count: int


def _chunks(tensor: Tensor) -> list[slice]:
    """Return the parts of a flat tensor that are updated at once."""
    return [slice(begin, begin + CHUNK) for begin in range(0, tensor.numel(), CHUNK)]


class Muon(Elementwise):
    """Groups with "muon": True are updated by Muon, others by AdamW. `attach` must precede the first step.

    `step` does everything. Before it, an engine may `start` masters as their gradients become known, and `finish` them
    while it would wait; `keep_started` then leaves only elementwise work to the step.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerConfig, seed: int, dtype: torch.dtype) -> None:
        """`dtype` is that in which matrices are orthogonalised."""
        super().__init__(groups, settings, seed)
        self.orthogonalised = 0  # matrices that this rank has orthogonalised for a step so far
        self.discarded = 0  # and in vain
        self._dtype = dtype
        self._pieces: dict[int, list[_Piece]] = {}  # by id of the group's master
        self._exchanges: dict[tuple[int, ...], list[MatrixExchange]] = {}  # by number of waves and ids of masters
        self._place: tuple[Layout, int, dist.ProcessGroup | None] | None = None
        self._load: list[int] = []  # FLOPs that the ranks of the stage own of masters that are started
        self._trace = Trace(torch.device("cpu"))
        self._started: MatrixQueue | None = None
        self._updates: dict[str, Tensor] | None = None  # updates of this rank's elements, if known before the step
        for group in self.param_groups:
            if group.get("muon"):
                own = (settings.muon_lr or settings.lr) / settings.lr
                group["lr_factor"] = own * group.get("lr_factor", 1.0)

    def attach(self, engine: Any, model: ModelConfig, layout: Layout) -> None:
        """Learn from DeepSpeed's `engine` where the elements of each matrix are. Collective."""
        super().attach(engine, model, layout)
        group, rank = stage_group(layout), layout.rank_in_stage(dist.get_rank())
        self._place, self._load = (layout, rank, group), [0] * len(layout.stage_places)
        self._trace = getattr(engine.optimizer, "trace", self._trace)
        for master, members in flat_groups(engine, layout.data_axis):
            pieces = []
            for name, begin, ranges in members:
                weight = weight_of(name)
                if weight.role is Role.HIDDEN_MATRIX:
                    assert weight.cut is not None
                    matrix = HeldMatrix(name, weight.part_shape(model, layout.tp), weight.cut, tuple(ranges))
                    start, end = ranges[layout.stage_places[rank][0]]
                    pieces.append(_Piece(matrix, begin, end - start))
            self._pieces[id(master)] = pieces

    @torch.no_grad()
    def start(self, master: Tensor, gradient: Tensor, scale: Tensor | None) -> None:
        """Send the matrices of a master, if it has any, to their owners, and orthogonalise those before. Collective.

        `gradient` is divided by `scale`; None: it is not clipped. States stay as they are.
        """
        if not self._pieces[id(master)]:
            return
        self._started = self._started or self._new_queue()
        self._send([master], {id(master): self._next_direction(master, gradient, scale)}, self._started, self._load, 1)
        self._started.advance(waiting=1)

    @torch.no_grad()
    def finish(self) -> None:
        """Orthogonalise all that was started. Collective."""
        if self._started is not None:
            self._started.advance()

    @torch.no_grad()
    def keep_started(self, valid: bool) -> None:
        """Keep the results of what was started for the step if they are those of its gradients. Collective."""
        queue, self._started = self._started, None
        if queue is not None:
            results = queue.results()
            self._updates = results if valid else None
            self._count(queue, valid)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights. Collective over the ranks of a stage."""
        every = self.param_groups
        hidden = [group for group in every if group.get("muon") and group["params"]]
        self.param_groups = [group for group in every if not group.get("muon")]
        try:
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = every
        if hidden:
            self.step_matrices([(master, group) for group in hidden for master in group["params"]])

    def step_matrices(self, masters: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Update masters, each with its group, by Muon. Collective."""
        updates, self._updates = self._updates, None
        directions = {id(master): self._advance_momentum(master, updates is None) for master, _ in masters}
        if updates is None:
            queue = self._new_queue()
            self._send([master for master, _ in masters], directions, queue, [0] * len(self._load), WAVES)
            updates = queue.results()
            self._count(queue, True)
        directions.clear()
        for master, group in masters:
            for piece in self._pieces[id(master)]:
                update = updates.pop(piece.matrix.name)
                for part in _chunks(update):
                    self.update(master, piece.begin + part.start, update[part].float(), group)
            self.drop_copy(master)

    def _advance_momentum(self, master: Tensor, wanted: bool) -> Tensor:
        """Advance a master's momentum; return what is to be orthogonalised, flat, if it is `wanted`."""
        self.begin_step(master, Role.HIDDEN_MATRIX)
        gradient, momentum = self.gradient(master).view(-1), self.state[master][EXP_AVG].view(-1)
        direction = torch.empty_like(gradient, dtype=self._dtype) if wanted else gradient.new_empty(0)
        for part in _chunks(master):
            grad = self.scaled(gradient[part].float())
            average = self._average(grad, momentum[part])
            if wanted:
                direction[part] = self._direction(grad, average)
            self.replace(momentum[part], average)
        return direction

    def _next_direction(self, master: Tensor, gradient: Tensor, scale: Tensor | None) -> Tensor:
        """Return what `_advance_momentum` will for a gradient that is to be divided by `scale`; states stay."""
        direction, momentum = torch.empty_like(gradient, dtype=self._dtype), self.state[master].get(EXP_AVG)
        for part in _chunks(master):
            grad = gradient[part].float() if scale is None else gradient[part].float() / scale
            average = self._average(grad, torch.zeros_like(grad) if momentum is None else momentum[part])
            direction[part] = self._direction(grad, average)
        return direction

    def _average(self, gradient: Tensor, momentum: Tensor) -> Tensor:
        return torch.lerp(gradient, momentum.float(), self._settings.momentum)

    def _direction(self, gradient: Tensor, average: Tensor) -> Tensor:
        return torch.lerp(gradient, average, self._settings.momentum) if self._settings.nesterov else average

    def _send(
        self, masters: list[Tensor], directions: dict[int, Tensor], queue: MatrixQueue, load: list[int], count: int
    ) -> None:
        """Send the matrices of masters in at most `count` parts to owners, which own `load` already."""
        held = {
            piece.matrix.name: directions[id(master)].narrow(0, piece.begin, piece.count)
            for master in masters
            for piece in self._pieces[id(master)]
        }
        key = (count, *(id(master) for master in masters))
        if key not in self._exchanges:
            self._exchanges[key] = self._new_exchanges(masters, load, count)
        for exchange in self._exchanges[key]:
            queue.advance(waiting=1)
            queue.start(exchange, held)

    def _new_exchanges(self, masters: list[Tensor], load: list[int], count: int) -> list[MatrixExchange]:
        assert self._place is not None, "attach() tells where the parts of the matrices are"
        layout, rank, group = self._place
        matrices = [piece.matrix for master in masters for piece in self._pieces[id(master)]]
        costs = [newton_schulz_flops(*matrix.shape(layout.tp), iterations=1) for matrix in matrices]
        owned = owners(costs, load)
        return [
            MatrixExchange(
                [matrices[i] for i in wave], [owned[i] for i in wave], layout, rank, group, masters[0].device
            )
            for wave in waves(owned, count)
        ]

    def _new_queue(self) -> MatrixQueue:
        def update(whole: Tensor) -> Tensor:
            return orthogonalised(whole).mul_(scale_of((whole.shape[0], whole.shape[1]), self._settings.muon_scale))

        return MatrixQueue(update, self._dtype, self._trace)

    def _count(self, queue: MatrixQueue, used: bool) -> None:
        self.orthogonalised += queue.mapped * used
        self.discarded += queue.mapped * (not used)
