"""Bytes that a step of Muon holds on a rank beside weights, gradients and states: whole matrices and their exchange.

Follows the buffers of `parallel/muon.py`, `parallel/matrix_exchange.py` and `parallel/newton_schulz.py` in the order in
which they are taken and released. At most two exchanges travel in each direction at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from llama_ds.config.schema import ModelConfig
from llama_ds.layout.matrix_owners import (
    WAVES,
    HeldMatrix,
    newton_schulz_elements,
    newton_schulz_flops,
    owners,
    waves,
)
from llama_ds.layout.optimizer_states import CHUNK, FP32_BYTES
from llama_ds.layout.weights import Role, decoder_layer

ALIGNMENT = 2  # DeepSpeed pads a flat buffer to a multiple of this for each rank
# fp32 temporaries of a chunk of elements: average of momentum and gradient, that of Nesterov's momentum, and in our
# pipeline the clipped gradient; of an update two products and their difference. Masters in bf16 have a few more.
AVERAGED, UPDATED = 2, 3
SUB_GROUP = 10**9  # DeepSpeed's default of ZeRO-3's sub_group_size


@dataclass(frozen=True)
class MatrixStep:
    """What decides the memory of Muon's step on the ranks of a pipeline position."""

    model: ModelConfig
    data_ranks: int  # ranks over which ZeRO cuts, dp * cp
    tp: int
    layers: int  # decoder layers of the position
    element_bytes: int  # matrices travel in this dtype
    zero_stage: int
    by_layer: bool  # our pipeline engine: each layer is a master of its own, and travels by itself
    sub_group: int = SUB_GROUP

    @property
    def replicated(self) -> bool:
        """Whether data-parallel ranks hold the same elements, each matrix a master of its own."""
        return self.zero_stage == 0

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """The data-parallel and the tensor-parallel rank of each rank of the stage."""
        return [divmod(rank, self.tp) for rank in range(self.data_ranks * self.tp)]


class _Memory:
    """Bytes held, and the most so far."""

    def __init__(self) -> None:
        self.held = self.peak = 0

    def take(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)

    def release(self, size: int) -> None:
        self.held -= size

    def pass_by(self, size: int) -> None:
        """Take and release."""
        self.take(size)
        self.release(size)


@lru_cache(maxsize=1000)  # the planner asks for every layout
def muon_bytes(step: MatrixStep) -> int:
    """Return the peak bytes of the fullest rank of a pipeline position in Muon's step."""
    return max((_peak_of_call(step, masters) for masters in _calls(step)), default=0)


def _calls(step: MatrixStep) -> Iterator[list[list[HeldMatrix]]]:
    """Yield the masters, as lists of matrices, of each call of Muon's step."""
    ranks, tp = step.data_ranks, step.tp
    rows = [row for row in decoder_layer(step.model) if row.role is Role.HIDDEN_MATRIX]
    layers = range(step.layers)

    def held(matrices: Iterable[tuple[int, int]], cuts: Iterable[tuple[tuple[int, int], ...]]) -> list[HeldMatrix]:
        return [
            HeldMatrix(f"{layer}.{i}", rows[i].part_shape(step.model, tp), rows[i].cut or 0, ranges)
            for (layer, i), ranges in zip(matrices, cuts, strict=True)
        ]

    sizes = [row.part_numel(step.model, tp) for row in rows]
    every = [(layer, i) for layer in layers for i in range(len(rows))]
    if step.replicated:
        yield [held([one], [((0, sizes[one[1]]),) * ranks]) for one in every]
    elif step.zero_stage == 3:
        group: list[tuple[int, int]] = []
        filled = 0
        for one in every:
            group.append(one)
            filled += -(-sizes[one[1]] // ranks)
            if filled >= step.sub_group or one == every[-1]:
                yield [held(group, (_evenly(sizes[i], ranks) for _, i in group))]
                group, filled = [], 0
    elif step.by_layer:
        cuts = list(_flat(sizes, ranks))
        yield [held(((layer, i) for i in range(len(rows))), cuts) for layer in reversed(layers)]
    else:
        yield [held(every, _flat([sizes[i] for _, i in every], ranks))]


def _evenly(numel: int, ranks: int) -> tuple[tuple[int, int], ...]:
    length = -(-numel // ranks)
    return tuple(pairwise(min(rank * length, numel) for rank in range(ranks + 1)))


def _flat(sizes: Sequence[int], ranks: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield the elements of each weight by rank, of which a flat buffer is cut into equal parts."""
    own, before = ALIGNMENT * -(-sum(sizes) // (ALIGNMENT * ranks)), 0
    for size in sizes:
        yield tuple(pairwise(min(max(rank * own - before, 0), size) for rank in range(ranks + 1)))
        before += size


@dataclass(frozen=True)
class _Part:
    """What one rank has of an exchange, in elements."""

    held: int
    sent: int
    owned: list[HeldMatrix]
    back: int  # elements of its results that it sends

    @property
    def whole(self) -> int:
        """Elements of the matrices that it owns."""
        return sum(matrix.part_numel for matrix in self.owned)


def _peak_of_call(step: MatrixStep, masters: list[list[HeldMatrix]]) -> int:
    """Return the peak bytes of the fullest rank in a call for these masters."""
    load, exchanges = [0] * len(step.places), list[list[tuple[HeldMatrix, int]]]()
    for matrices in masters if step.by_layer else [[matrix for master in masters for matrix in master]]:
        owned = owners([newton_schulz_flops(*matrix.shape(step.tp), iterations=1) for matrix in matrices], load)
        for wave in waves(owned, 1 if step.by_layer else WAVES):
            exchanges.append([(matrices[i], owned[i]) for i in wave])
    peak = 0
    for data in range(step.data_ranks):
        held = [[matrix.count(data) for matrix in master] for master in masters]
        for rank in range(data * step.tp, (data + 1) * step.tp):
            peak = max(peak, _peak(step, held, _parts(step, exchanges, rank)))
    return peak


def _parts(step: MatrixStep, exchanges: list[list[tuple[HeldMatrix, int]]], rank: int) -> list[_Part]:
    places, found = step.places, []
    data = places[rank][0]
    for exchange in exchanges:
        counts = [(matrix.count(data), owner, matrix.replicated) for matrix, owner in exchange]
        sent = sum(n for n, owner, replicated in counts if not replicated or places[owner][0] == data)
        own = [matrix for matrix, owner in exchange if owner == rank]
        back = sum(step.tp * matrix.part_numel * (step.data_ranks if matrix.replicated else 1) for matrix in own)
        found.append(_Part(sum(n for n, *_ in counts), sent, own, back))
    return found


def _peak(step: MatrixStep, held: list[list[int]], parts: Sequence[_Part]) -> int:
    """Return the peak bytes of a rank that holds these elements of each master's matrices."""
    tp, memory = step.tp, _Memory()
    alone, fp32 = step.data_ranks * tp == 1, FP32_BYTES // step.element_bytes
    travelling: list[_Part] = []
    returning = 0
    every = sum(map(sum, held))
    if not step.by_layer:
        for own in held:
            memory.take(sum(own))  # what is to be orthogonalised
            memory.pass_by(AVERAGED * fp32 * min(CHUNK, sum(own)))

    def map_first() -> None:
        nonlocal returning
        part = travelling.pop(0)
        if not alone:
            memory.take(part.whole * tp)
            memory.pass_by(max((m.part_numel * tp for m in part.owned if m.cut and tp > 1), default=0))
            memory.release(part.sent + part.whole * tp)  # the buffers in which it travelled
        for matrix in part.owned:
            memory.pass_by(newton_schulz_elements(*matrix.shape(tp), step.element_bytes))
            memory.take(matrix.part_numel * tp)
            memory.release(0 if alone else matrix.part_numel * tp)
        if alone:
            memory.release(part.held if step.by_layer else 0)
            return
        copied = sum(m.part_numel * tp for m in part.owned if m.cut and tp > 1)
        memory.take(copied + part.back + part.held)
        memory.release(copied + part.whole * tp + returning)
        returning = part.back

    for part in parts:
        if step.by_layer:
            memory.take(part.held)
            memory.pass_by((AVERAGED + 1) * fp32 * min(CHUNK, part.held))
        if not alone:
            memory.take(part.sent + part.whole * tp)
            memory.release(part.held if step.by_layer else 0)
        travelling.append(part)
        if len(travelling) > 1:
            map_first()
    while travelling:
        map_first()
    memory.release(returning + (0 if step.by_layer else every))
    if step.by_layer:  # momentum
        memory.pass_by((AVERAGED + 1) * fp32 * min(CHUNK, max(map(sum, held))))
    memory.pass_by((UPDATED + (fp32 > 1)) * fp32 * min(CHUNK, max(map(max, held))))
    return memory.peak * step.element_bytes
