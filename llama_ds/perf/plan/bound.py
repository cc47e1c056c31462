"""Lower bounds of a layout's step time, without an order of its passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import combinations, pairwise, product

from llama_ds.config.recompute import POLICIES
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import StepJob
from llama_ds.perf.plan.layer import layer_time
from llama_ds.perf.plan.rank_spread import slowdown
from llama_ds.perf.plan.step import end_of_step, stage_costs, stage_message, stage_times
from llama_ds.schedules.schedule import defers
from llama_ds.schedules.simulate import StageCost


def lower_bound(gpu: Hardware, job: StepJob) -> float:
    """Return a lower bound of the step time in seconds."""
    costs = stage_costs(gpu, job)
    return step_bound(gpu, job, costs, pipeline_bound(job, costs, sum(stage_message(gpu, job))))


def step_bound(gpu: Hardware, job: StepJob, costs: list[StageCost], pipeline: float) -> float:
    """Return a lower bound of the step time from one of the pipeline's time."""
    step_s = gpu.calibration.step_ms * 1e-3
    return pipeline * slowdown(gpu, job.ranks) + sum(end_of_step(gpu, job, costs)) + step_s


def pipeline_bound(job: StepJob, costs: list[StageCost], message: float) -> float:
    """Return a lower bound of the pipeline's time.

    Every rank first waits for one forward through the preceding stages, unless it begins a step before the others have
    ended the one before. The backwards of these stages follow its last backward, unless deferred weight gradients fill
    the drain phase. With few micro-batches, the longest path is longer.
    """
    split = defers(job.schedule, job.joint)
    longest = 0.0
    for rank, own in enumerate(_own(job)):
        busy = job.micro_batches * sum(sum(astuple(costs[stage])) for stage in own)
        before = costs[:rank]
        fill = 0.0 if job.post_validation else sum(c.forward + message for c in before)
        drain = 0.0 if split else sum(c.input_backward + c.weight_backward for c in before)
        longest = max(longest, fill + busy + drain)
    return max(longest, _path(job, costs, message))


def _path(job: StepJob, costs: list[StageCost], message: float) -> float:
    """Return the time of the longest path through a step, which its last micro-batch takes.

    After its predecessors in the last stage, its backward goes through all stages. Before them, a forward does, unless
    it begins before the other ranks have ended the step before; the last stage's do not.
    """
    hops = message * sum(_hops(job))
    last = job.micro_batches * (costs[-1].forward + costs[-1].input_backward)
    back = hops + sum(cost.input_backward for cost in costs[:-1]) + costs[0].weight_backward
    out = 0.0 if job.post_validation else hops + sum(cost.forward for cost in costs[:-1])
    return out + last + back


def _hops(job: StepJob) -> list[bool]:
    """Return for each stage but the last whether its output goes to another rank."""
    placement = job.placement
    ranks = [placement.home(stage)[0] for stage in range(placement.stages)]
    return [here != there for here, there in pairwise(ranks)]


@dataclass(frozen=True)
class Residence:
    """How long a stage holds a micro-batch at least, in a job without recompute.

    On average a rank holds, over a step of duration T with m micro-batches, m / T times the sum of these times (Little,
    Operations Research 9, 1961). What it can hold therefore bounds T.
    """

    job: StepJob
    costs: list[StageCost]
    own: list[list[int]]  # stages of each rank
    slack: list[float]  # by rank: time in which the GPU waits for the host, in which recompute is free
    recompute: Mapping[str, float]  # GPU's time of a layer's recompute for a micro-batch, by policy
    saved: Mapping[str, int]  # bytes that a layer saves for a micro-batch, by policy
    through: list[float]  # by stage: from the start of a forward to the end of its backward

    @classmethod
    def of(cls, gpu: Hardware, job: StepJob, costs: list[StageCost], saved: Mapping[str, int]) -> Residence:
        """Return the times of `job`, whose policies are none."""
        stages, own = stage_times(gpu, job), _own(job)
        waits = [max(0.0, sum(astuple(cost)) - stage.whole.device) for cost, stage in zip(costs, stages, strict=True)]
        recompute = {policy: layer_time(gpu, job, policy).recompute.device for policy in POLICIES}
        message, hops = sum(stage_message(gpu, job)), [*_hops(job), False]
        through, time = [0.0] * len(costs), 0.0
        for stage in reversed(range(len(costs))):
            time += costs[stage].forward + costs[stage].input_backward + 2 * message * hops[stage]
            through[stage] = time
        return cls(job, costs, own, [sum(waits[s] for s in stages) for stages in own], recompute, saved, through)

    def with_limit(self, limit: int) -> float:
        """Return the bound for ranks that hold `limit` forwards of a chunk until their weight gradients."""
        return max(
            self.job.micro_batches * sum(self.through[s] + self.costs[s].weight_backward for s in own) / limit
            for own in self.own
        )

    def with_held(self, forwards: float, room: Sequence[float]) -> float:
        """Return the bound for ranks that hold at least so many forwards of a chunk in `room` bytes at a time.

        It counts the recompute of one chunk, as if all were of that chunk; infinite where full recompute is too little.
        """
        longest, number = 0.0, self.job.micro_batches
        for rank, own in enumerate(self.own):
            layers = min(sum(n for _, n in self.job.stages[stage]) for stage in own)
            busy = number * (sum(sum(astuple(self.costs[stage])) for stage in own) - self.slack[rank])
            choices = [(number * layers * self.recompute[p], float(self.saved[p])) for p in POLICIES]
            longest = max(longest, busy + _least_first(choices, room[rank] / forwards / layers))
        return longest

    def with_room(self, room: Sequence[float]) -> float:
        """Return the bound for ranks with `room` bytes for saved activations, with the recompute that this takes."""
        if min(room) <= 0:
            return float("inf")
        longest, number = 0.0, self.job.micro_batches
        for rank, own in enumerate(self.own):
            busy = number * sum(sum(astuple(self.costs[stage])) for stage in own)
            choices = []  # by stage and policy: the GPU's time for recompute, and the bytes held on average times T
            for stage in own:
                layers = number * sum(n for _, n in self.job.stages[stage])
                held = layers * self.through[stage] / room[rank]
                choices.append([(layers * self.recompute[p], held * self.saved[p]) for p in POLICIES])
            least = busy - number * self.slack[rank]
            points = [(least + sum(a for a, _ in one), sum(b for _, b in one)) for one in product(*choices)]
            longest = max(longest, busy, _least_maximum(points))
        return longest


def _own(job: StepJob) -> list[list[int]]:
    """Return the stages of each rank."""
    placement = job.placement
    return [[placement.stage(rank, chunk) for chunk in range(job.chunks)] for rank in range(job.pp)]


def _least_maximum(points: Sequence[tuple[float, float]]) -> float:
    """Return the least possible maximum of the two numbers of a mixture of `points`."""
    best = min(map(max, points))
    for (a, b), (c, d) in combinations(points, 2):
        if (a - b) * (c - d) < 0:  # the two numbers are equal at some mixture
            share = (a - b) / ((a - b) - (c - d))
            best = min(best, a + share * (c - a))
    return best


def _least_first(points: Sequence[tuple[float, float]], most: float) -> float:
    """Return the least possible first number of a mixture of `points` whose second number is at most `most`."""
    best = min((a for a, b in points if b <= most), default=float("inf"))
    for (a, b), (c, d) in combinations(points, 2):
        if min(b, d) <= most < max(b, d):
            best = min(best, a + (most - b) / (d - b) * (c - a))
    return best
