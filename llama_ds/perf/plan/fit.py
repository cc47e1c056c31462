"""Fits the calibration constants to measured runs, and cross-validates the fit on held-out sources.

The loss is the mean of |log(predicted / measured)|, capped so that no single row dominates. Each source is weighted by
the square root of its number of rows. A penalty on the distance from a prior value keeps constants that the rows hardly
determine near it. The search is a coordinate descent with shrinking steps, within physical bounds.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

from llama_ds.perf.plan.hardware import Calibration, Hardware
from llama_ds.perf.plan.rows import Row, group_of
from llama_ds.perf.plan.validate import Checked, check, predict, summary

BOUNDS: dict[str, tuple[float, float]] = {
    "gemm_ceiling": (0.5, 0.92),
    "gemm_ramp": (16, 512),
    "misaligned": (0.4, 1.0),
    "memory": (0.4, 0.92),
    "flash_forward": (0.1, 0.75),
    "flash_backward": (0.1, 0.65),
    "network": (0.3, 0.95),
    "contention": (0.02, 0.5),
    "launch_us": (3, 40),
    "kernel_us": (1, 15),
    "step_ms": (1, 60),
}
_CAP = 0.5
_PRIOR = 0.01  # penalty of a constant at e times its prior value: as much as 1% more error on all rows

# Expectations for a GPU before seeing any run: large products at 80% of the peak, copies at 85% of the bandwidth,
# FlashAttention-2 at 50-73% (arXiv 2307.08691, section 1).
PRIORS = {
    "gemm_ceiling": 0.80,
    "gemm_ramp": 64.0,
    "misaligned": 0.6,
    "memory": 0.85,
    "flash_forward": 0.60,
    "flash_backward": 0.45,
    "network": 0.80,
    "contention": 0.3,
    "launch_us": 15.0,
    "kernel_us": 5.0,
    "step_ms": 5.0,
}


def changed(calibration: Calibration, name: str, value: float) -> Calibration:
    """Return the calibration with one constant changed."""
    return Calibration(**{**asdict(calibration), name: value})


def weights(rows: Sequence[Row]) -> list[float]:
    """Return each row's weight, so that a source counts by the square root of its number of rows."""
    count: dict[str, int] = defaultdict(int)
    for row in rows:
        count[group_of(row.source)] += 1
    return [1 / math.sqrt(count[group_of(row.source)]) for row in rows]


def loss(rows: Sequence[Row], machines: dict[str, Hardware], fit: Calibration) -> float:
    """Return the weighted mean of |log(predicted / measured)|."""
    total = norm = 0.0
    fitted = {name: replace(machine, calibration=fit) for name, machine in machines.items()}
    for row, weight in zip(rows, weights(rows), strict=True):
        total += weight * min(_CAP, abs(math.log(predict(row, fitted[row.gpu]) / row.value)))
        norm += weight
    return total / norm


def objective(rows: Sequence[Row], machines: dict[str, Hardware], fit: Calibration) -> float:
    """Return the objective: the loss on the rows plus the distance of the constants from the priors."""
    distance = sum(math.log(getattr(fit, name) / value) ** 2 for name, value in PRIORS.items())
    return loss(rows, machines, fit) + _PRIOR * distance


def fit(
    rows: Sequence[Row],
    machines: dict[str, Hardware],
    start: Calibration,
    free: Sequence[str] = tuple(BOUNDS),
    rounds: int = 6,
    print_line: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Return the calibration that fits `rows` best, starting from `start`."""
    best, lowest = start, objective(rows, machines, start)
    step = 0.16
    for turn in range(rounds):
        moved = False
        for name in free:
            for factor in (1 + step, 1 / (1 + step)):
                while True:
                    low, high = BOUNDS[name]
                    value = min(high, max(low, getattr(best, name) * factor))
                    trial = changed(best, name, value)
                    found = objective(rows, machines, trial) if value != getattr(best, name) else lowest
                    if found >= lowest - 1e-6:
                        break
                    best, lowest, moved = trial, found, True
        print_line(f"round {turn + 1}: mean |log error| {loss(rows, machines, best):.4f}, objective {lowest:.4f}")
        if not moved or turn % 2:
            step /= 2
    return best


def usable(rows: Sequence[Row], machines: Mapping[str, Hardware], every: int) -> list[Row]:
    """Return the rows with times on these machines; sources with over 500 rows keep every n-th (`every`)."""
    count = Counter(row.source for row in rows)
    seen: Counter[str] = Counter()
    found = []
    for row in rows:
        seen[row.source] += 1
        thinned = count[row.source] > 500 and seen[row.source] % every
        if row.job and row.gpu in machines and row.kind != "peak_mem_gib" and math.isfinite(row.value) and not thinned:
            found.append(row)
    return found


def cross_validate(
    rows: Sequence[Row], machines: dict[str, Hardware], start: Calibration, rounds: int = 2
) -> dict[str, dict[str, float]]:
    """Return the errors on each source of a fit to all other sources, and the errors on all rows together.

    Each fit starts at `PRIORS`, so that no information about the held-out source leaks in.
    """
    prior = Calibration(**{**asdict(start), **PRIORS})
    found: dict[str, dict[str, float]] = {}
    together: list[Checked] = []
    for source in sorted({group_of(row.source) for row in rows}):
        others = [row for row in rows if group_of(row.source) != source]
        if not others:
            continue
        calibration = fit(others, machines, prior, rounds=rounds)
        fitted = {name: replace(machine, calibration=calibration) for name, machine in machines.items()}
        judged, _ = check([row for row in rows if group_of(row.source) == source], fitted)
        found[source] = summary(judged)
        together += judged
    if together:
        found["all, each judged unseen"] = summary(together)
    return found
