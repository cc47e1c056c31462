"""Times of a stage's passes and of a message, as integers: every rank derives the same order from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from llama_ds.schedules.simulate import StageCost

EQUAL_PASSES = (1, 1, 1, 0)


@dataclass(frozen=True)
class PassTimes:
    """Times of every stage's passes, and of a message between ranks, in any unit."""

    stages: tuple[StageCost, ...]
    message: int

    @classmethod
    def of(cls, numbers: Sequence[int], stages: int) -> PassTimes:
        """Return the times that the run file's numbers state; `numbers` must have no obstacle."""
        *passes, message = numbers
        costs = [StageCost(*passes[i : i + 3]) for i in range(0, len(passes), 3)]
        return cls(tuple(costs if len(costs) == stages else costs * stages), message)

    @property
    def equal(self) -> bool:
        """Whether all passes take the same time and messages none."""
        return not self.message and len({t for c in self.stages for t in astuple(c)}) == 1


def pass_times_of(stages: Sequence[StageCost], message: float, unit: float = 1.0) -> tuple[int, ...]:
    """Return measured or planned times as the run file's numbers, in multiples of `unit`."""
    passes = [max(1, round(time / unit)) for cost in stages for time in astuple(cost)]
    return (*passes, max(0, round(message / unit)))


def numbers_obstacle(numbers: Sequence[int], stages: int) -> str | None:
    """Return why the run file's numbers are not the times of `stages` stages; None if they are."""
    if len(numbers) not in (4, 3 * stages + 1):
        return (
            f"{len(numbers)} entries; use 4, the times of forward, input backward, weight backward and a message, "
            f"or {3 * stages + 1}, three for each of {stages} stages and the message"
        )
    wrong = next((i for i, n in enumerate(numbers[:-1]) if n < 1), None)
    if wrong is not None:
        return f"entry {wrong} is {numbers[wrong]}; the time of a pass is 1 or more"
    if numbers[-1] < 0:
        return f"the message's time is {numbers[-1]}; use 0 or more"
    return None
