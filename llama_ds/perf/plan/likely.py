"""How sure a predicted speed is: the interval in which four of five measured runs like it lay.

Alike are runs on one node, or on several; with a pipeline, or without. The intervals come from the A100 runs in
docs/calibration (`validate.spans`, which a test compares with them).
"""

from __future__ import annotations

from typing import NamedTuple

from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.step import StepTime


class Interval(NamedTuple):
    """The 10th and 90th percentile of measured over predicted speed, and the number of runs."""

    low: float
    high: float
    runs: int


# (several nodes, pipeline)
SPANS = {
    (False, False): Interval(0.888, 1.177, 778),
    (False, True): Interval(0.895, 1.142, 729),
    (True, False): Interval(0.759, 1.019, 31),
    (True, True): Interval(0.884, 1.063, 110),
}


def likely_speed(gpu: Hardware, step: StepTime) -> tuple[float, float, int] | None:
    """Return the likely tokens/s of one GPU, lowest and highest, and the runs behind them; None if none are alike.

    All runs are on A100s, and none shares rows among ranks.
    """
    if not gpu.name.startswith("a100") or step.job.sharing.size > 1:
        return None
    span = SPANS[step.job.ranks > gpu.links.gpus_per_node, step.job.pp > 1]
    return step.tokens_per_second * span.low, step.tokens_per_second * span.high, span.runs
