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
from llama_ds.layout.matrix_owners import ITERATIONS, HeldMatrix
from llama_ds.layout.optimizer_states import EXP_AVG
from llama_ds.layout.weights import Role, weight_of
from llama_ds.parallel.elementwise import Elementwise
from llama_ds.parallel.grid import stage_group
from llama_ds.parallel.matrix_exchange import MatrixExchange
from llama_ds.parallel.optimizer_state import flat_groups

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a, b, c of Jordan et al.
NORM_EPS = 1e-7


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return about U V^T of the singular value decomposition U S V^T of a matrix (n, m), in the matrix's dtype.

    X / |X| with the Frobenius norm has singular values in [0, 1]. An iteration maps each of them by the polynomial
    a x + b x^3 + c x^5; five leave those that were not tiny between 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + NORM_EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


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


class Muon(Elementwise):
    """Groups with "muon": True are updated by Muon, others by AdamW. `attach` must precede the first step."""

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerConfig, seed: int, dtype: torch.dtype) -> None:
        """`dtype` is that in which matrices are orthogonalised."""
        super().__init__(groups, settings, seed)
        self.orthogonalised = 0  # matrices that this rank has orthogonalised so far
        self._dtype = dtype
        self._pieces: dict[int, list[_Piece]] = {}  # by id of the group's master
        self._exchanges: dict[tuple[int, ...], MatrixExchange] = {}
        self._place: tuple[Layout, int, dist.ProcessGroup | None] | None = None
        for group in self.param_groups:
            if group.get("muon"):
                own = (settings.muon_lr or settings.lr) / settings.lr
                group["lr_factor"] = own * group.get("lr_factor", 1.0)

    def attach(self, engine: Any, model: ModelConfig, layout: Layout) -> None:
        """Learn from DeepSpeed's `engine` where the elements of each matrix are. Collective."""
        super().attach(engine, model, layout)
        group, rank = stage_group(layout), layout.rank_in_stage(dist.get_rank())
        self._place = layout, rank, group
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
            self._step_matrices([(master, group) for group in hidden for master in group["params"]])

    def _step_matrices(self, masters: list[tuple[Tensor, dict[str, Any]]]) -> None:
        found = {id(master): self._momentum(master) for master, _ in masters}
        held = {
            piece.matrix.name: found[id(master)].narrow(0, piece.begin, piece.count)
            for master, _ in masters
            for piece in self._pieces[id(master)]
        }
        updates = self._orthogonalised([master for master, _ in masters], held)
        for master, group in masters:
            flat = found[id(master)].zero_()  # padding between matrices has no update
            for piece in self._pieces[id(master)]:
                flat.narrow(0, piece.begin, piece.count).copy_(updates[piece.matrix.name])
            self.update(master, 0, flat, group)
            self.drop_copy(master)

    def _momentum(self, master: Tensor) -> Tensor:
        """Advance a master's momentum; return what is to be orthogonalised, a new flat tensor."""
        self.begin_step(master, Role.HIDDEN_MATRIX)
        momentum, beta = self.state[master][EXP_AVG], self._settings.momentum
        grad = self.scaled(self.gradient(master).float())
        average = torch.lerp(grad, momentum.float(), beta)
        self.replace(momentum, average)
        return (torch.lerp(grad, average, beta) if self._settings.nesterov else average).reshape(-1)

    def _orthogonalised(self, masters: list[Tensor], held: dict[str, Tensor]) -> dict[str, Tensor]:
        exchange = self._exchange(masters)
        wholes = {}
        for matrix, whole in exchange.gather(held, self._dtype):
            scale = scale_of((whole.shape[0], whole.shape[1]), self._settings.muon_scale)
            wholes[matrix.name] = orthogonalised(whole) * scale
            self.orthogonalised += 1
        return exchange.give_back(wholes, self._dtype)

    def _exchange(self, masters: list[Tensor]) -> MatrixExchange:
        key = tuple(id(master) for master in masters)
        if key not in self._exchanges:
            assert self._place is not None, "attach() tells where the parts of the matrices are"
            matrices = [piece.matrix for master in masters for piece in self._pieces[id(master)]]
            self._exchanges[key] = MatrixExchange(matrices, *self._place, masters[0].device)
        return self._exchanges[key]
