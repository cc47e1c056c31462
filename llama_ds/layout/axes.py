"""The parallel axes of a job: the one place that turns a rank into coordinates and back.

Ranks are numbered with the axes of `AXES` from the outermost to the innermost, as DeepSpeed's
PipeModelDataParallelTopology numbers them, so that the ranks of a tensor-parallel group are neighbours on one node.
An axis is added here, in `ParallelConfig`, and where it computes something.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

NAMED = ("pp", "dp", "tp")  # always named in texts; other axes only where they are larger than 1


class Coords(NamedTuple):
    """A rank's coordinates, counted from 0 along each axis; outermost axis first."""

    pp: int = 0  # pipeline stage of the rank
    dp: int = 0  # data-parallel replica
    cp: int = 0  # part of the sequence
    tp: int = 0  # part of each matrix

    @property
    def named(self) -> dict[str, int]:
        """The coordinates that texts name: along pp, dp and tp, and along further axes where they are not 0."""
        return {axis: at for axis, at in self._asdict().items() if axis in NAMED or at}

    def words(self) -> str:
        """Return the coordinates in words: "pp 0 dp 3 tp 1"."""
        return " ".join(f"{axis} {at}" for axis, at in self.named.items())


AXES = Coords._fields


@dataclass(frozen=True)
class Axes:
    """Sizes of the axes."""

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
        """The number of ranks that hold one copy of the model."""
        return self.world // self.dp

    def stride(self, axis: str) -> int:
        """Return the distance in rank numbers between neighbours along `axis`."""
        return math.prod(self.sizes[AXES.index(axis) + 1 :])

    def coords(self, rank: int) -> Coords:
        """Return the coordinates of a rank.

        Raises:
            ValueError: no such rank.
        """
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not one of 0 to {self.world - 1}")
        found = []
        for size in reversed(self.sizes):
            rank, at = divmod(rank, size)
            found.append(at)
        return Coords(*reversed(found))

    def rank(self, **coords: int) -> int:
        """Return the rank at `coords`; axes left out are at 0.

        Raises:
            TypeError: an unknown axis.
            ValueError: a coordinate beyond its axis.
        """
        place = Coords(**coords)
        for axis, at, size in zip(AXES, place, self.sizes, strict=True):
            if not 0 <= at < size:
                raise ValueError(f"{axis} {at} is not one of 0 to {size - 1}")
        return sum(at * self.stride(axis) for axis, at in zip(AXES, place, strict=True))

    def group(self, rank: int, *axes: str) -> list[int]:
        """Return the ranks that share all coordinates of `rank` but those along `axes`, in increasing order."""
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
        places = [self.coords(rank) for rank in ranks]
        return [axis for axis, values in zip(AXES, zip(*places, strict=True), strict=True) if len(set(values)) > 1]

    @property
    def named(self) -> dict[str, int]:
        """The sizes that texts name: pp, dp and tp, and further axes where they are larger than 1."""
        return {axis: size for axis, size in self.sizes._asdict().items() if axis in NAMED or size > 1}

    def words(self, times: str = " x ") -> str:
        """Return the sizes in words: "pp 2 x dp 4 x tp 8"."""
        return times.join(f"{axis} {size}" for axis, size in self.named.items())
