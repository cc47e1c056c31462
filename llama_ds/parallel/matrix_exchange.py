"""Gathers the matrices of a stage whole, each on the rank that owns it, and gives them back in parts.

Parts may be cut by tensor parallelism, by ZeRO, and by both. Every rank sends and receives each element once: one
all-to-all in each direction, whose sizes every rank counts by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ds.layout.layout import Layout
from llama_ds.layout.matrix_owners import HeldMatrix
from llama_ds.parallel.trace import Trace

Wholes = list[tuple[HeldMatrix, Tensor]]


class MatrixExchange:
    """The exchange of some matrices between the ranks of a stage."""

    def __init__(
        self,
        matrices: Sequence[HeldMatrix],
        owners: Sequence[int],
        layout: Layout,
        rank: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        """`owners` are those of the matrices, and `rank` is this rank's number, in the stage's `group`.

        Without a group the stage has one rank.
        """
        self._tp, self._rank, self._group, self._device = layout.tp, rank, group, device
        self._places = layout.stage_places
        self._ranks = len(self._places)
        self._owned: list[list[HeldMatrix]] = [[] for _ in range(self._ranks)]
        for matrix, owner in zip(matrices, owners, strict=True):
            self._owned[owner].append(matrix)

    def start_gather(self, held: Mapping[str, Tensor], dtype: torch.dtype, trace: Trace) -> Callable[[], Wholes]:
        """Send this rank's elements, flat in `held` by name, to the owners in `dtype`. Collective.

        The returned call waits for the matrices that this rank owns: (rows, columns) each.
        """
        mine, own = self._owned[self._rank], self._rank
        if self._group is None:
            return lambda: [(m, held[m.name].view(m.part_shape)) for m in mine]
        sent = [held[m.name] for owner in range(self._ranks) for m in self._owned[owner] if self._sent(m, owner)]
        sizes = [sum(self._count(m, own) for m in self._owned[to] if self._sent(m, to)) for to in range(self._ranks)]
        arriving = [[m for m in mine if self._sent(m, own, source)] for source in range(self._ranks)]
        counts = [sum(self._count(m, source) for m in some) for source, some in enumerate(arriving)]
        wait = self._exchange(sent, sizes, counts, dtype, trace)

        def wholes() -> Wholes:
            pieces = iter(wait().split(self._lengths(arriving)))
            parts = {m.name: torch.empty(self._tp, m.part_numel, dtype=dtype, device=self._device) for m in mine}
            for source, some in enumerate(arriving):
                for matrix in some:
                    start, end = self._range(matrix, source)
                    parts[matrix.name][self._places[source][1], start:end] = next(pieces)
            return [(m, self._whole(m, parts.pop(m.name))) for m in mine]

        return wholes

    def start_give_back(
        self, wholes: Mapping[str, Tensor], dtype: torch.dtype, trace: Trace
    ) -> Callable[[], dict[str, Tensor]]:
        """Send the parts of this rank's matrices, which are `wholes` by name, to the ranks that hold them. Collective.

        The returned call waits for this rank's elements of all matrices, flat and by name.
        """
        mine, own = self._owned[self._rank], self._rank
        if self._group is None:
            return lambda: {m.name: wholes[m.name].view(-1) for m in mine}
        parts = {m.name: [p.reshape(-1) for p in wholes[m.name].chunk(self._tp, m.cut)] for m in mine}
        cuts = [part for _, part in self._places]
        sent = [parts[m.name][cuts[to]][slice(*self._range(m, to))] for to in range(self._ranks) for m in mine]
        sizes = [sum(self._count(m, to) for m in mine) for to in range(self._ranks)]
        counts = [sum(self._count(m, own) for m in some) for some in self._owned]
        wait = self._exchange(sent, sizes, counts, dtype, trace)
        every = [m for some in self._owned for m in some]

        def elements() -> dict[str, Tensor]:
            pieces = wait().split([self._count(m, own) for m in every])
            return {m.name: piece for m, piece in zip(every, pieces, strict=True)}

        return elements

    def _whole(self, matrix: HeldMatrix, parts: Tensor) -> Tensor:
        """Return the matrix (rows, columns) of its tensor-parallel parts (tp, elements)."""
        if matrix.cut == 0 or self._tp == 1:
            return parts.view(matrix.shape(self._tp))
        return torch.cat(parts.view(self._tp, *matrix.part_shape).unbind(), matrix.cut)

    def _exchange(
        self, sent: list[Tensor], sizes: list[int], counts: list[int], dtype: torch.dtype, trace: Trace
    ) -> Callable[[], Tensor]:
        empty = torch.empty(0, dtype=dtype, device=self._device)
        outgoing = torch.cat([empty, *(piece.to(dtype) for piece in sent)])
        arrived = torch.empty(sum(counts), dtype=dtype, device=self._device)
        work = dist.all_to_all_single(arrived, outgoing, counts, sizes, group=self._group, async_op=True)
        assert work is not None
        watched = trace.watch("matrices", work, outgoing.nbytes)

        def wait() -> Tensor:
            begin = trace.mark()
            work.wait()
            trace.add("wait matrices", begin)
            trace.done("matrices", watched, outgoing.nbytes)
            return arrived

        return wait

    def _lengths(self, arriving: list[list[HeldMatrix]]) -> list[int]:
        return [self._count(m, source) for source, some in enumerate(arriving) for m in some]

    def _range(self, matrix: HeldMatrix, rank: int) -> tuple[int, int]:
        return matrix.ranges[self._places[rank][0]]

    def _count(self, matrix: HeldMatrix, rank: int) -> int:
        return matrix.count(self._places[rank][0])

    def _sent(self, matrix: HeldMatrix, owner: int, source: int | None = None) -> bool:
        """Return whether `source` (None: this rank) sends its elements: of replicas, those of the owner's model do."""
        rank = self._rank if source is None else source
        return not matrix.replicated or self._places[rank][0] == self._places[owner][0]


class MatrixQueue:
    """Maps whole matrices on their owners, while the matrices before and behind them travel.

    All ranks of a stage make the same calls in the same order.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype, trace: Trace) -> None:
        """`dtype` is that in which matrices travel and `function` gets them."""
        self._function, self._dtype, self._trace = function, dtype, trace
        self._gathers: deque[tuple[MatrixExchange, Callable[[], Wholes]]] = deque()
        self._returns: deque[Callable[[], dict[str, Tensor]]] = deque()
        self._found: dict[str, Tensor] = {}  # this rank's elements of results that have arrived
        self.mapped = 0  # matrices that this rank has mapped

    def start(self, exchange: MatrixExchange, held: Mapping[str, Tensor]) -> None:
        """Send this rank's elements to their owners. Collective."""
        self._gathers.append((exchange, exchange.start_gather(held, self._dtype, self._trace)))

    def advance(self, waiting: int = 0) -> None:
        """Map the matrices that were sent first, until only `waiting` exchanges are left. Collective.

        Buffers are released as soon as they have served: `layout/matrix_memory.py` counts them.
        """
        while len(self._gathers) > waiting:
            exchange, wait = self._gathers.popleft()
            arrived = wait()
            del wait
            begin = self._trace.mark()
            mapped: dict[str, Tensor] = {}
            while arrived:
                name = arrived[0][0].name
                mapped[name] = self._function(arrived.pop(0)[1]).contiguous()
            self.mapped += len(mapped)
            self._trace.add("orthogonalise", begin)
            self._returns.append(exchange.start_give_back(mapped, self._dtype, self._trace))
            del mapped
            self._receive(waiting=1)

    def results(self) -> dict[str, Tensor]:
        """Return this rank's elements of all results, flat and by name. Collective."""
        self.advance()
        self._receive()
        return self._found

    def _receive(self, waiting: int = 0) -> None:
        """Wait for the results that were sent back first, until only `waiting` exchanges are left."""
        while len(self._returns) > waiting:
            self._found |= self._returns.popleft()()
