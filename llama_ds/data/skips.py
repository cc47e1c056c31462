"""Skipped rows: arithmetic between the rows of a run and those of its row stream.

The rows of a mixture form one stream. Without skips, the run reads all of it. A skip of K steps at step S discards,
before step S of the run, the rows of K steps: those that the steps S to S + K - 1 would have read without it. Mixture
stages count steps of the run: if a stage also starts at S, the discarded rows belong to the new stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from llama_ds.config.batch_stages import Batches

ONE_ROW = Batches((1,))  # with it, rows and steps have one number


@dataclass(frozen=True)
class Skip:
    """Skip of `steps` steps of the stream before `step` of the run."""

    step: int
    steps: int


class Skips:
    """All skips of a run, by step."""

    def __init__(self, skips: Sequence[Skip] = (), batches: Batches = ONE_ROW) -> None:
        if any(s.step < 0 or s.steps <= 0 for s in skips) or any(b.step <= a.step for a, b in pairwise(skips)):
            raise ValueError("skips must cover one step or more and be in ascending order of steps")
        self.all, self._batches = tuple(skips), batches

    def position(self, row: int) -> int:
        """Return the row of the stream that is number `row` of the run."""
        first_row = self._batches.first_row
        return row + sum(self._discarded(skip) for skip in self.all if first_row(skip.step) <= row)

    def end(self, step: int) -> int:
        """Return the row of the stream after those of the steps before `step` of the run."""
        return self._batches.first_row(step) + sum(self._discarded(skip) for skip in self.all if skip.step < step)

    def windows(self, step: int) -> list[tuple[int, int]]:
        """Return the [first, last) ranges of rows of the stream that the run has skipped before `step`."""
        ends = [(skip, self.end(skip.step)) for skip in self.all if skip.step < step]
        return [(end, end + self._discarded(skip)) for skip, end in ends]

    def _discarded(self, skip: Skip) -> int:
        return skip.steps * self._batches.of(skip.step)  # not of later stages, which a resume may change


def unmade(asked: Sequence[Skip], made: Sequence[Skip], step: int) -> list[Skip]:
    """Return the skips in `asked` that lie before `step`, are not in `made` and thus can no longer be made."""
    return [skip for skip in asked if skip.step < step and skip not in made]
