"""Which weight's gradient rose before a loss spike.

A norm has risen where it exceeds the median of the lines long before the spike by `SIGMAS` robust standard deviations
and by the factor `FACTOR`. The last `NEAR` lines before the spike are not part of what is usual.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ds.job.robust_stats import median_and_deviation
from llama_ds.launch.supervise.spikes import Spike, SpikeRule

WINDOW = 64  # lines that show what is usual
NEAR = 8  # lines before the spike in which a rise is looked for
FEW = 8  # fewer lines do not show what is usual
SIGMAS, FACTOR = 8.0, 2.0


@dataclass(frozen=True)
class Rise:
    """The first measured step at which the norm of a weight's gradient had risen, and how often its median it was."""

    step: int
    role: str
    layer: int  # from 1; 1 for a role that has one weight
    only: bool  # the role has one weight
    times: float

    def __str__(self) -> str:
        place = self.role if self.only else f"{self.role} of layer {self.layer}"
        return f"the gradient of {place} rose first, at step {self.step:,}, to {self.times:.1f} times its median"


def spikes(steps: Sequence[int], losses: Sequence[float]) -> Iterator[Spike]:
    """Yield the spikes of a loss curve, by the supervisor's rule."""
    rule, last = SpikeRule(), None
    for step, loss in zip(steps, losses, strict=True):
        spike = rule.take(step, loss)
        if spike and spike.step != last:
            last = spike.step
            yield spike


def before_spike(metrics: Path, spike: int) -> str:
    """Say whose gradient rose before the step `spike`, by the last lines of a run's metrics.jsonl that have norms."""
    texts: deque[str] = deque(maxlen=2 * (WINDOW + NEAR))  # some may have been measured after the spike
    try:
        with open(metrics, encoding="utf-8") as file:
            texts.extend(text for text in file if '"norms": {' in text)
    except (OSError, UnicodeDecodeError) as error:
        return f"{metrics} cannot be read ({error}), so it is not known whose gradient rose before the spike"
    lines = []
    for text in texts:
        with suppress(ValueError):  # a line that is still being written
            lines.append(json.loads(text))
    return in_words(first_rise(lines, spike))


def in_words(rise: Rise | None) -> str:
    """Return what is said of a rise before a spike, or of none."""
    return str(rise or "no gradient is known to have risen before it")


def first_rise(lines: Sequence[Mapping[str, Any]], spike: int) -> Rise | None:
    """Return the rise that was measured first up to the step `spike`, the largest of those of one step.

    `lines` are those of metrics.jsonl that have norms, by step. Lines after the spike do not count.
    """
    before = [line for line in lines if line["step"] <= spike]
    usual, near = before[-WINDOW - NEAR : -NEAR], before[-NEAR:]
    if len(usual) < FEW:
        return None
    found = []
    for role, values in usual[-1]["norms"]["gradient"].items():
        for layer in range(len(values)):
            numbers = [number for line in usual if (number := _number(line, role, layer)) is not None]
            if len(numbers) < FEW:
                continue
            median, deviation = median_and_deviation(numbers)
            for line in near:
                number = _number(line, role, layer)
                if number is not None and number > max(FACTOR * median, median + SIGMAS * deviation):
                    found.append(Rise(line["step"], role, layer + 1, len(values) == 1, number / (median or number)))
                    break
    return min(found, key=lambda rise: (rise.step, -rise.times), default=None)


def _number(line: Mapping[str, Any], role: str, layer: int) -> float | None:
    values = line["norms"]["gradient"].get(role, ())
    return values[layer] if layer < len(values) else None
