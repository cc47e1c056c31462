"""Expected effective training time under failures: intervals of checkpoints, spares, duration of a run.

Failures are a Poisson process over the job's whole time. After one, the job restarts from its newest checkpoint: from
hosts' memory if its copy has survived, else from disk. Intervals: Young, "A first order approximation to the optimum
checkpoint interval", CACM 17(9), 1974; Daly, "A higher order estimate of the optimum checkpoint interval for restart
dumps", FGCS 22(3), 2006. Both know one tier; the simulation has several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

FACTORS = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)  # searched multiples of Young's interval
_BISECTIONS = 26  # to a part in 10^8 of the time between two failures


@dataclass(frozen=True)
class Tier:
    """A place of checkpoints; times are seconds."""

    name: str
    save_s: float  # time for which a save blocks the training
    restart_s: float  # time from a failure to the first step after it, when restoring from this tier
    write_s: float = 0.0  # time after which a save that no longer blocks is complete
    share: float = 1.0  # share of failures after which this is the tier to restore from
    interval_s: float = math.inf  # training time between two saves

    def young(self, mtbf_s: float) -> float:
        """Return Young's interval for the failures of this tier."""
        return math.sqrt(2 * self.save_s * mtbf_s / self.share) if self.share else math.inf

    def daly(self, mtbf_s: float) -> float:
        """Return Daly's interval for the failures of this tier."""
        mtbf = mtbf_s / self.share if self.share else math.inf
        if not math.isfinite(mtbf) or self.save_s >= 2 * mtbf:
            return mtbf
        ratio = math.sqrt(self.save_s / (2 * mtbf))
        return math.sqrt(2 * self.save_s * mtbf) * (1 + ratio / 3 + ratio * ratio / 9) - self.save_s


@dataclass(frozen=True)
class Simulated:
    """Durations of simulated runs, in seconds of wall time, and the training time that each of them needs."""

    training_s: float
    wall_s: np.ndarray
    failures: float  # mean number

    @property
    def effective(self) -> float:
        """The expected share of effective training time."""
        return self.training_s / float(self.wall_s.mean())

    def quantile_s(self, certainty: float) -> float:
        """Return the duration that is not exceeded with this certainty."""
        return float(np.quantile(self.wall_s, certainty, method="inverted_cdf"))


def mtbf_s(failures_per_gpu_day: float, gpus: int) -> float:
    """Return the mean time between failures of a job in seconds."""
    return 86400 / (failures_per_gpu_day * gpus)


def first_order(tiers: Sequence[Tier], mtbf: float) -> float:
    """Return the expected share by the sum of costs: blocked by saves, and restart and half an interval per failure.

    It is 0 or less if a run makes no progress by this approximation.
    """
    saving = sum(tier.save_s / tier.interval_s for tier in tiers)
    lost = sum(tier.share * (tier.restart_s + tier.write_s + tier.interval_s / 2) for tier in tiers)
    return (1 - lost / mtbf) / (1 + saving)


def daly_share(tier: Tier, mtbf: float) -> float:
    """Return the expected share for one tier by Daly's complete model, with failures during restarts and saves."""
    cycle = (tier.interval_s + tier.save_s) / mtbf
    lost_s = tier.restart_s + tier.write_s
    if max(cycle, lost_s / mtbf) > 700:  # beyond the range of exp: no progress
        return 0.0
    return tier.interval_s / (mtbf * math.exp(lost_s / mtbf) * math.expm1(cycle))


def with_intervals(tiers: Sequence[Tier], mtbf: float, step_s: float) -> list[Tier]:
    """Return the tiers with Young's intervals, of one step at least; intervals that are set stay."""
    return [
        replace(tier, interval_s=max(tier.young(mtbf), step_s)) if math.isinf(tier.interval_s) else tier
        for tier in tiers
    ]


def simulate(tiers: Sequence[Tier], mtbf: float, training_s: float, runs: int = 256, seed: int = 0) -> Simulated:
    """Simulate `runs` runs that need `training_s` seconds of training each.

    Saves are due at multiples of their intervals, as by `checkpoint.interval`. A failure restores from the tier that
    is drawn by the tiers' shares; failures during a restart begin it again. A run that would take 1,000 times its
    training time counts as endless.
    """
    random = np.random.default_rng(seed)
    shares = np.cumsum([tier.share for tier in tiers])
    wall, complete = np.zeros(runs), np.zeros((len(tiers), runs))  # training time of each tier's newest checkpoint
    done = np.zeros(runs)
    limit, failures = 1e3 * training_s, 0
    active = np.arange(runs)
    while active.size:
        up = random.exponential(mtbf, active.size)
        begin = done[active]
        reached = _reached(tiers, begin, up, training_s)
        ends = reached >= training_s
        needed = _cost(tiers, np.where(ends, training_s, reached)) - _cost(tiers, begin)
        wall[active] += np.where(ends, needed, up)
        failures += int((~ends).sum())
        active, reached = active[~ends], reached[~ends]
        drawn = np.searchsorted(shares, random.random(active.size) * shares[-1], side="right")
        drawn = np.minimum(drawn, len(tiers) - 1)
        for number, tier in enumerate(tiers):  # a save in progress is not complete; its predecessors are
            newest = np.floor((reached - tier.write_s) / tier.interval_s) * tier.interval_s
            complete[number, active] = np.maximum(complete[number, active], newest)
        for number, tier in enumerate(tiers):
            hit = active[drawn == number]
            done[hit] = complete[number, hit]
            wall[hit] += _restarts(random, tier.restart_s, mtbf, hit.size)
        complete[:, active] = np.minimum(complete[:, active], done[active])  # what was lost is not there to restore
        wall[active[wall[active] > limit]] = math.inf
        active = active[wall[active] <= limit]
    return Simulated(training_s, wall, failures / runs)


def best_intervals(
    tiers: Sequence[Tier], mtbf: float, training_s: float, step_s: float, runs: int = 64
) -> tuple[list[Tier], float]:
    """Return the tiers with the intervals that are best by simulation, and their share.

    Each tier's interval is searched in turn over multiples of Young's, with the same random numbers. The best ones lie
    in a flat minimum: their neighbours differ by less than the simulation's noise.
    """
    found = with_intervals(tiers, mtbf, step_s)
    fixed = [math.isfinite(tier.interval_s) for tier in tiers]
    needed = min(training_s, 200 * mtbf)
    best = simulate(found, mtbf, needed, runs).effective
    for number, tier in enumerate(found):
        for factor in () if fixed[number] else FACTORS:
            trial = list(found)
            trial[number] = replace(tier, interval_s=max(factor * tier.interval_s, step_s))
            share = simulate(trial, mtbf, needed, runs).effective
            if share > best:
                best, found = share, trial
    return found, best


def _cost(tiers: Sequence[Tier], done: np.ndarray) -> np.ndarray:
    """Return the wall time, without failures, of `done` seconds of training."""
    return done + sum(tier.save_s * np.floor(done / tier.interval_s) for tier in tiers)


def _reached(tiers: Sequence[Tier], begin: np.ndarray, up: np.ndarray, end: float) -> np.ndarray:
    """Return the training time that runs reach within `up` seconds of wall time from `begin`."""
    before = _cost(tiers, begin)
    low, high = begin.copy(), np.minimum(begin + up, end)
    finished = _cost(tiers, high) - before <= up
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fits = _cost(tiers, middle) - before <= up
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return np.where(finished, np.minimum(begin + up, end), low)


def _restarts(random: np.random.Generator, restart_s: float, mtbf: float, count: int) -> np.ndarray:
    """Return the time of restarts that begin again at each failure (Daly 2006); infinite after 1,000 failures."""
    total, waiting = np.zeros(count), np.arange(count)
    for _ in range(1000):
        up = random.exponential(mtbf, waiting.size)
        total[waiting] += np.minimum(up, restart_s)
        waiting = waiting[up < restart_s]
        if not waiting.size:
            return total
    total[waiting] = math.inf
    return total


def spares_needed(
    hosts_lost_per_s: float, repair_s: float, duration_s: float, certainty: float, runs: int = 2000, seed: int = 0
) -> tuple[int, int]:
    """Return the spare hosts with which a job has enough: at a moment, and throughout its duration, with a certainty.

    Hosts leave by a Poisson process and come back after `repair_s`. At a moment, the number that is out has a Poisson
    distribution with the mean of hosts lost during a repair.
    """
    random = np.random.default_rng(seed)
    mean = hosts_lost_per_s * min(repair_s, duration_s)
    moment = int(np.quantile(random.poisson(mean, 200_000), certainty, method="inverted_cdf"))
    most = np.zeros(runs, int)
    for number, count in enumerate(random.poisson(hosts_lost_per_s * duration_s, runs)):
        lost = np.sort(random.uniform(0, duration_s, count))
        out = np.arange(1, count + 1) - np.searchsorted(lost, lost - repair_s)
        most[number] = out.max(initial=0)
    return moment, int(np.quantile(most, certainty, method="inverted_cdf"))
