"""Lower bound of a layout's step time, without an order of its passes."""

from __future__ import annotations

from itertools import pairwise

from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import StepJob
from llama_ds.perf.plan.rank_spread import slowdown
from llama_ds.perf.plan.step import end_of_step, stage_costs, stage_message
from llama_ds.schedules.schedule import DEFERRING
from llama_ds.schedules.simulate import StageCost


def lower_bound(gpu: Hardware, job: StepJob) -> float:
    """Return a lower bound of the step time in seconds.

    Every rank first waits for one forward through the preceding stages, unless it begins a step before the others have
    ended the one before. The backwards of these stages follow its last backward, unless deferred weight gradients fill
    the drain phase. With few micro-batches, the longest path is longer.
    """
    costs = stage_costs(gpu, job)
    transfer, wait = stage_message(gpu, job)
    placement = job.placement
    split = job.schedule in DEFERRING or job.joint > 1
    longest = 0.0
    for rank in range(job.pp):
        own = [costs[placement.stage(rank, chunk)] for chunk in range(job.chunks)]
        busy = job.micro_batches * sum(c.forward + c.input_backward + c.weight_backward for c in own)
        before = costs[:rank]
        fill = 0.0 if job.post_validation else sum(c.forward + transfer + wait for c in before)
        drain = 0.0 if split else sum(c.input_backward + c.weight_backward for c in before)
        longest = max(longest, fill + busy + drain)
    longest = max(longest, _path(job, costs, transfer + wait))
    longest *= slowdown(gpu, job.ranks)
    return longest + sum(end_of_step(gpu, job, costs)) + gpu.calibration.step_ms * 1e-3


def _path(job: StepJob, costs: list[StageCost], message: float) -> float:
    """Return the time of the longest path through a step, which its last micro-batch takes.

    After its predecessors in the last stage, its backward goes through all stages. Before them, a forward does, unless
    it begins before the other ranks have ended the step before; the last stage's do not.
    """
    ranks = [job.placement.home(stage)[0] for stage in range(job.placement.stages)]
    hops = message * sum(here != there for here, there in pairwise(ranks))
    last = job.micro_batches * (costs[-1].forward + costs[-1].input_backward)
    back = hops + sum(cost.input_backward for cost in costs[:-1]) + costs[0].weight_backward
    out = 0.0 if job.post_validation else hops + sum(cost.forward for cost in costs[:-1])
    return out + last + back
