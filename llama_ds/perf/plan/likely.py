"""How sure a predicted speed is: the interval in which most measured runs like it lay.

Alike are runs on one node, on several without a pipeline, and on several with one. The intervals come from the A100
runs in docs/calibration (`validate.spans`, which a test compares with them).
"""

from __future__ import annotations

from typing import NamedTuple

from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import StepJob
from llama_ds.perf.plan.step import StepTime


class Interval(NamedTuple):
    """Measured over predicted speed, lowest and highest, the number of runs, and the share of unseen runs inside.

    The share is the mean over the sources, each judged by the interval of all the others.
    """

    low: float
    high: float
    runs: int
    covered: float


# (several nodes, pipeline)
SPANS = {
    (False, False): Interval(0.893, 1.167, 1701, 0.801),
    (True, False): Interval(0.772, 1.081, 234, 0.802),
    (True, True): Interval(0.864, 1.144, 155, 0.813),
}


def kind(job: StepJob, gpus_per_node: int) -> tuple[bool, bool]:
    """Return the key of the runs that a job is like."""
    several = job.ranks > gpus_per_node
    return several, several and job.pp > 1


def likely_speed(gpu: Hardware, step: StepTime) -> Interval | None:
    """Return the likely tokens/s of one GPU, and the runs behind it; None if none are alike.

    All runs are on A100s, and none shares rows among ranks.
    """
    if not gpu.name.startswith("a100") or step.job.sharing.size > 1:
        return None
    span = SPANS[kind(step.job, gpu.links.gpus_per_node)]
    return span._replace(low=step.tokens_per_second * span.low, high=step.tokens_per_second * span.high)
