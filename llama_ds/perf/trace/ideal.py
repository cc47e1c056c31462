"""Simulated reference steps of the schedule: with equal stages, with measured stages, and with messages."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field

from llama_ds.perf.trace.kinds import RECOMPUTE
from llama_ds.perf.trace.read import Event
from llama_ds.schedules.pass_times import pass_times_of
from llama_ds.schedules.schedule import IN_A_V, Schedule
from llama_ds.schedules.simulate import StageCost, Timeline, simulate


@dataclass
class Times:
    """Compute times by kind and stage of the model, in microseconds."""

    of: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, event: Event, length: float) -> None:
        """Add one computation; `length` excludes nested events."""
        self.of[event.what, max(event.stage, 0)].append(length)

    def extend(self, other: Times) -> None:
        """Add the times of other ranks."""
        for key, found in other.of.items():
            self.of[key] += found

    def costs(self, stages: int) -> list[StageCost]:
        """Return the median costs of each stage.

        An unsplit backward counts half as input backward and half as weight backward. Recompute time is spread
        evenly over the stage's backwards.
        """
        return [self._cost(stage) for stage in range(stages)]

    def _cost(self, stage: int) -> StageCost:
        backward = self._median("BW", stage)
        recompute = sum(self.of[RECOMPUTE, stage]) / max(1, len(self.of["BW", stage]) + len(self.of["B", stage]))
        if self.of["W", stage]:
            return StageCost(self._median("F", stage), self._median("B", stage) + recompute, self._median("W", stage))
        return StageCost(self._median("F", stage), backward / 2 + recompute, backward / 2)

    def _median(self, what: str, stage: int) -> float:
        found = self.of[what, stage]
        return statistics.median(found) if found else 0.0


@dataclass(frozen=True)
class Ideal:
    """Simulated steps without optimizer. Idle is the mean time per rank without computation, in microseconds."""

    bubble: float  # share of the schedule with equal stages and free messages
    length: float  # its length, microseconds
    idle: float  # its idle time
    idle_imbalanced: float  # idle time with the stages' measured times
    idle_messages: float  # idle time with these and messages that take `transit`
    transit: float  # median transit time of a message, microseconds
    pass_times: tuple[int, ...] | None  # the measured times as `parallel.pass_times`, if the stages stand in a V

    def lost(self, step: float, idle: float) -> dict[str, float | None]:
        """Return the lost time by cause, in percent of a step of `step` microseconds with `idle` percent idle time."""
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
    """Return the simulations of the schedule with the measured times."""
    costs = times.costs(schedule.placement.stages)
    equal = StageCost(*(statistics.mean(part) for part in zip(*map(_parts, costs), strict=True)))
    if not sum(_parts(equal)):
        return Ideal(0.0, 0.0, 0.0, 0.0, 0.0, transit, None)
    balanced, measured = simulate(schedule, equal), simulate(schedule, costs)
    with_messages = simulate(schedule, costs, latency=transit)
    pass_times = pass_times_of(costs, transit) if schedule.name in IN_A_V else None
    return Ideal(
        balanced.bubble, balanced.length, _idle(balanced), _idle(measured), _idle(with_messages), transit, pass_times
    )


def _parts(cost: StageCost) -> tuple[float, float, float]:
    return cost.forward, cost.input_backward, cost.weight_backward


def _idle(found: Timeline) -> float:
    return found.bubble * found.length
