"""The parallel axes of a job. Only this module converts ranks to coordinates and back.

Ranks are numbered with the axes of `AXES` from the outermost to the innermost, as DeepSpeed's
PipeModelDataParallelTopology does, so that the ranks of a tensor-parallel group are neighbours on one node. A new axis
is added here, in `ParallelConfig`, and in the code that computes along it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

NAMED = ("pp", "dp", "tp")  # messages always name these axes; they name other axes only if larger than 1


class Coords(NamedTuple):
    """A rank's coordinates, counted from 0 along each axis; outermost axis first."""

    pp: int = 0  # pipeline rank
    dp: int = 0  # data-parallel replica
    cp: int = 0  # shard of the sequence
    tp: int = 0  # shard of each matrix

    @property
    def named(self) -> dict[str, int]:
        """The coordinates that messages name: pp, dp and tp always, other axes only if not 0."""
        return {axis: at for axis, at in self._asdict().items() if axis in NAMED or at}

    def words(self) -> str:
        """Return the coordinates in words: "pp 0 dp 3 tp 1"."""
        return " ".join(f"{axis} {at}" for axis, at in self.named.items())


AXES = Coords._fields


@dataclass(frozen=True)
class Axes:
    """Sizes of the parallel axes."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def sizes(self) -> Coords:
        """The sizes in rank order, outermost first."""
        return Coords(*(getattr(self, axis) for axis in AXES))

    @property
    def world(self) -> int:
        """The number of ranks."""
        return math.prod(self.sizes)

    @property
    def replica(self) -> int:
        """The number of ranks that hold one model replica."""
        return self.world // self.dp

    @property
    def data_axis(self) -> int:
        """The size of all axes between pp and tp together, which are one data axis to DeepSpeed."""
        return self.stride("pp") // self.tp

    @property
    def stage_places(self) -> list[tuple[int, int]]:
        """Of each rank of a stage, in order: its index along `data_axis`, and its tensor-parallel rank."""
        return [divmod(rank, self.tp) for rank in range(self.stride("pp"))]

    def rank_in_stage(self, rank: int) -> int:
        """Return a rank's number among those of its stage."""
        return rank % self.stride("pp")

    @property
    def replica_sizes(self) -> dict[str, int]:
        """The sizes of `named` without dp: those of one copy of the model."""
        return {axis: size for axis, size in self.named.items() if axis != "dp"}

    def stride(self, axis: str) -> int:
        """Return the distance in rank numbers between neighbours along `axis`."""
        return math.prod(self.sizes[AXES.index(axis) + 1 :])

    def coords(self, rank: int) -> Coords:
        """Return the coordinates of a rank.

        Raises:
            ValueError: The rank is out of range.
        """
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not one of 0 to {self.world - 1}")
        found = []
        for size in reversed(self.sizes):
            rank, at = divmod(rank, size)
            found.append(at)
        return Coords(*reversed(found))

    def rank(self, **coords: int) -> int:
        """Return the rank at `coords`; omitted coordinates are 0.

        Raises:
            TypeError: An axis is unknown.
            ValueError: A coordinate is out of range.
        """
        complete = Coords(**coords)
        for axis, at, size in zip(AXES, complete, self.sizes, strict=True):
            if not 0 <= at < size:
                raise ValueError(f"{axis} {at} is not one of 0 to {size - 1}")
        return sum(at * self.stride(axis) for axis, at in zip(AXES, complete, strict=True))

    def group(self, rank: int, *axes: str) -> list[int]:
        """Return the ranks of the group along `axes` that contains `rank`, in increasing order."""
        members = [self.coords(rank)]
        for axis in axes:
            members = [at._replace(**{axis: n}) for at in members for n in range(getattr(self, axis))]
        return sorted(self.rank(**at._asdict()) for at in members)

    def groups(self, *axes: str) -> list[list[int]]:
        """Return all groups along `axes`, ordered by their first ranks."""
        firsts = (rank for rank in range(self.world) if not any(getattr(self.coords(rank), axis) for axis in axes))
        return [self.group(rank, *axes) for rank in firsts]

    def varying(self, ranks: Iterable[int]) -> list[str]:
        """Return the axes along which `ranks` differ."""
        coords = [self.coords(rank) for rank in ranks]
        return [axis for axis, values in zip(AXES, zip(*coords, strict=True), strict=True) if len(set(values)) > 1]

    @property
    def named(self) -> dict[str, int]:
        """The sizes that messages name: pp, dp and tp always, other axes only if larger than 1."""
        return {axis: size for axis, size in self.sizes._asdict().items() if axis in NAMED or size > 1}

    def words(self, times: str = " x ") -> str:
        """Return the sizes in words: "pp 2 x dp 4 x tp 8"."""
        return times.join(f"{axis} {size}" for axis, size in self.named.items())
