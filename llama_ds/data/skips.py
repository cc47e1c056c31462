"""Skipped rows: arithmetic between the steps of a run and the steps of its row stream.

The rows of a mixture form one stream of equal steps. Without skips, step s of the run reads step s of the stream. A
skip of K steps at step S discards K steps of the stream before step S of the run. Mixture stages count steps of the
run: if a stage also starts at S, the discarded rows belong to the new stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Skip:
    """Skip of `steps` steps of the stream before `step` of the run."""

    step: int
    steps: int


class Skips:
    """All skips of a run, by step."""

    def __init__(self, skips: Sequence[Skip] = ()) -> None:
        if any(s.step < 0 or s.steps <= 0 for s in skips) or any(b.step <= a.step for a, b in pairwise(skips)):
            raise ValueError("skips must cover one step or more and be in ascending order of steps")
        self.all = tuple(skips)

    def position(self, step: int) -> int:
        """Return the step of the stream that `step` of the run reads."""
        return step + sum(skip.steps for skip in self.all if skip.step <= step)

    def end(self, step: int) -> int:
        """Return the stream position after the steps before `step` of the run, in steps."""
        return step + sum(skip.steps for skip in self.all if skip.step < step)

    def windows(self, step: int) -> list[tuple[int, int]]:
        """Return the [first, last) ranges of stream steps that the run has skipped before `step`."""
        return [(self.end(skip.step), self.position(skip.step)) for skip in self.all if skip.step < step]


def unmade(asked: Sequence[Skip], made: Sequence[Skip], step: int) -> list[Skip]:
    """Return the skips in `asked` that lie before `step`, are not in `made` and thus can no longer be made."""
    return [skip for skip in asked if skip.step < step and skip not in made]
