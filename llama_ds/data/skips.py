"""Rows that a run passes over: arithmetic between the steps of a run and those of the stream that it reads.

The rows of a mixture are one stream, in steps of one size. A run without skips reads step s of the stream in its step
s. A skip of K steps at step S lets K steps of the stream go by unread before step S of the run. Stages of the mixture
are counted in steps of the run: where one begins at S too, what goes by is the new stage's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Skip:
    """Before `step` of the run, `steps` of the stream are passed over."""

    step: int
    steps: int


class Skips:
    """All skips of a run, by step."""

    def __init__(self, skips: Sequence[Skip] = ()) -> None:
        if any(s.step < 0 or s.steps <= 0 for s in skips) or any(b.step <= a.step for a, b in pairwise(skips)):
            raise ValueError("skips are of one step or more and follow one another")
        self.all = tuple(skips)

    def place(self, step: int) -> int:
        """Return the step of the stream that `step` of the run reads."""
        return step + sum(skip.steps for skip in self.all if skip.step <= step)

    def end(self, step: int) -> int:
        """Return how far the steps before `step` of the run have come in the stream."""
        return step + sum(skip.steps for skip in self.all if skip.step < step)

    def windows(self, step: int) -> list[tuple[int, int]]:
        """Return the (first, last) steps of the stream that the steps before `step` of the run have passed over."""
        return [(self.end(skip.step), self.place(skip.step)) for skip in self.all if skip.step < step]


def unmade(asked: Sequence[Skip], made: Sequence[Skip], step: int) -> list[Skip]:
    """Return which of the skips `asked` for a run that made those of `made` before `step` cannot make any more."""
    return [skip for skip in asked if skip.step < step and skip not in made]
