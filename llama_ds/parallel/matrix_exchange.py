"""Gathers the matrices of a stage whole, each on the rank that owns it, and gives them back in parts.

Parts may be cut by tensor parallelism, by ZeRO, and by both. Every rank sends and receives each element once: one
all-to-all in each direction, whose sizes every rank counts by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ds.layout.layout import Layout
from llama_ds.layout.matrix_owners import HeldMatrix, newton_schulz_flops, owners


class MatrixExchange:
    """The exchange of some matrices between the ranks of a stage."""

    def __init__(
        self,
        matrices: Sequence[HeldMatrix],
        layout: Layout,
        rank: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        """`rank` is this rank's number in the stage's `group`; None: the stage has one rank."""
        self._tp, self._rank, self._group, self._device = layout.tp, rank, group, device
        self._places = layout.stage_places
        self._ranks = len(self._places)
        costs = [newton_schulz_flops(*matrix.shape(layout.tp), iterations=1) for matrix in matrices]
        self._owned: list[list[HeldMatrix]] = [[] for _ in range(self._ranks)]
        for matrix, owner in zip(matrices, owners(costs, self._ranks), strict=True):
            self._owned[owner].append(matrix)

    def gather(self, held: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[HeldMatrix, Tensor]]:
        """Yield the matrices that this rank owns, whole: (rows, columns). Collective.

        `held` are this rank's elements by name, flat; they travel in `dtype`.
        """
        mine, own = self._owned[self._rank], self._rank
        sent = [held[m.name] for owner in range(self._ranks) for m in self._owned[owner] if self._sent(m, owner)]
        sizes = [sum(self._count(m, own) for m in self._owned[to] if self._sent(m, to)) for to in range(self._ranks)]
        arriving = [[m for m in mine if self._sent(m, own, source)] for source in range(self._ranks)]
        counts = [sum(self._count(m, source) for m in some) for source, some in enumerate(arriving)]
        pieces = iter(self._exchange(sent, sizes, counts, dtype).split(self._lengths(arriving)))
        parts = {m.name: torch.empty(self._tp, m.part_numel, dtype=dtype, device=self._device) for m in mine}
        for source, some in enumerate(arriving):
            for matrix in some:
                start, end = self._range(matrix, source)
                parts[matrix.name][self._places[source][1], start:end] = next(pieces)
        for matrix in mine:
            whole = parts.pop(matrix.name).view(self._tp, *matrix.part_shape)
            yield matrix, torch.cat(whole.unbind(), matrix.cut)

    def give_back(self, wholes: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Return this rank's elements, flat and by name, of matrices whose owners give them whole. Collective."""
        mine, own = self._owned[self._rank], self._rank
        parts = {m.name: [p.reshape(-1) for p in wholes[m.name].chunk(self._tp, m.cut)] for m in mine}
        cuts = [part for _, part in self._places]
        sent = [parts[m.name][cuts[to]][slice(*self._range(m, to))] for to in range(self._ranks) for m in mine]
        sizes = [sum(self._count(m, to) for m in mine) for to in range(self._ranks)]
        counts = [sum(self._count(m, own) for m in some) for some in self._owned]
        arrived = self._exchange(sent, sizes, counts, dtype)
        names = [m for some in self._owned for m in some]
        pieces = arrived.split([self._count(m, own) for m in names])
        return {m.name: piece for m, piece in zip(names, pieces, strict=True)}

    def _exchange(self, sent: list[Tensor], sizes: list[int], counts: list[int], dtype: torch.dtype) -> Tensor:
        empty = torch.empty(0, dtype=dtype, device=self._device)
        outgoing = torch.cat([empty, *(piece.to(dtype) for piece in sent)])
        if self._group is None:
            return outgoing
        arrived = torch.empty(sum(counts), dtype=dtype, device=self._device)
        dist.all_to_all_single(arrived, outgoing, counts, sizes, group=self._group)
        return arrived

    def _lengths(self, arriving: list[list[HeldMatrix]]) -> list[int]:
        return [self._count(m, source) for source, some in enumerate(arriving) for m in some]

    def _range(self, matrix: HeldMatrix, rank: int) -> tuple[int, int]:
        return matrix.ranges[self._places[rank][0]]

    def _count(self, matrix: HeldMatrix, rank: int) -> int:
        start, end = self._range(matrix, rank)
        return end - start

    def _sent(self, matrix: HeldMatrix, owner: int, source: int | None = None) -> bool:
        """Return whether `source` (None: this rank) sends its elements: of replicas, those of the owner's model do."""
        rank = self._rank if source is None else source
        return not matrix.replicated or self._places[rank][0] == self._places[owner][0]
