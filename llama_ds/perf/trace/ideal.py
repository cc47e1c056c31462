"""The step that the schedule could have had: simulated with equal stages, with the measured ones, with messages."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field

from llama_ds.perf.trace.kinds import RECOMPUTE
from llama_ds.perf.trace.read import Event
from llama_ds.schedules.schedule import Schedule
from llama_ds.schedules.simulate import StageCost, Timeline, simulate


@dataclass
class Times:
    """How long computations took, by kind and stage of the model, in microseconds."""

    of: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, event: Event, length: float) -> None:
        """Add one computation of `length`, without what lay within it."""
        self.of[event.what, max(event.stage, 0)].append(length)

    def extend(self, other: Times) -> None:
        """Add what others took."""
        for key, found in other.of.items():
            self.of[key] += found

    def costs(self, stages: int) -> list[StageCost]:
        """Return the medians of each stage; a whole backward counts half for inputs, half for weights.

        What a stage recomputes, in whole, is spread over its backwards.
        """
        return [self._cost(stage) for stage in range(stages)]

    def _cost(self, stage: int) -> StageCost:
        backward = self._median("BW", stage)
        again = sum(self.of[RECOMPUTE, stage]) / max(1, len(self.of["BW", stage]) + len(self.of["B", stage]))
        if self.of["W", stage]:
            return StageCost(self._median("F", stage), self._median("B", stage) + again, self._median("W", stage))
        return StageCost(self._median("F", stage), backward / 2 + again, backward / 2)

    def _median(self, what: str, stage: int) -> float:
        found = self.of[what, stage]
        return statistics.median(found) if found else 0.0


@dataclass(frozen=True)
class Ideal:
    """Simulated steps without optimizer. Idle is a rank's mean time without computing, microseconds."""

    bubble: float  # share of the schedule with equal stages and free messages
    length: float  # of it, microseconds
    idle: float  # in it
    idle_imbalanced: float  # with the stages' own times
    idle_messages: float  # and messages that take `transit`
    transit: float  # a message's median time, microseconds

    def lost(self, step: float, idle: float) -> dict[str, float | None]:
        """Return what a step of `step` microseconds loses to what, in percent; it idles `idle` percent in all."""
        parts = [self.idle, self.idle_imbalanced - self.idle, self.idle_messages - self.idle_imbalanced]
        schedule, imbalance, messages = (part / step * 100 for part in parts)
        return {
            "ideal_bubble": self.bubble * 100,
            "lost_schedule": schedule,
            "lost_imbalance": imbalance,
            "lost_messages": messages,
            "lost_rest": idle - schedule - imbalance - messages,
        }


def ideal(schedule: Schedule, times: Times, transit: float) -> Ideal:
    """Simulate the schedule with the measured times."""
    costs = times.costs(schedule.place.stages)
    equal = StageCost(*(statistics.mean(part) for part in zip(*map(_parts, costs), strict=True)))
    if not sum(_parts(equal)):
        return Ideal(0.0, 0.0, 0.0, 0.0, 0.0, transit)
    alike, own = simulate(schedule, equal), simulate(schedule, costs)
    late = simulate(schedule, costs, latency=transit)
    return Ideal(alike.bubble, alike.length, _idle(alike), _idle(own), _idle(late), transit)


def _parts(cost: StageCost) -> tuple[float, float, float]:
    return cost.forward, cost.input_backward, cost.weight_backward


def _idle(found: Timeline) -> float:
    return found.bubble * found.length
