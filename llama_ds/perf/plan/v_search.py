"""Zero-bubble Vs in the search: bounds before any order of a size, and the fastest V that fits.

All Vs of a size differ in the micro-batches that ranks may hold, in `post_validation`, in joint weight gradients and in
the times by which they are ordered. An order takes a simulation of the whole pipeline, so each choice first gets a
lower bound from the work, the longest path and the memory (`bound.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from llama_ds.config.recompute import POLICIES
from llama_ds.config.rules import check
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import Layout
from llama_ds.layout.rank_memory import layer_work, rank_memory
from llama_ds.layout.recompute import GIB, USABLE, StagePolicies
from llama_ds.perf.plan.bound import Residence, pipeline_bound, step_bound
from llama_ds.perf.plan.candidate import TOO_LARGE, Candidate, Rejected, candidate, legal, reject, words_of
from llama_ds.perf.plan.estimate import Estimate
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import StepJob, job_of, layers_by_policy
from llama_ds.perf.plan.step import stage_costs, stage_message
from llama_ds.perf.plan.tensor_chunks import with_chunks
from llama_ds.schedules.pass_times import EQUAL_PASSES, PassTimes, pass_times_of
from llama_ds.schedules.simulate import StageCost
from llama_ds.schedules.zero_bubble_v import ZeroBubbleV

MAX_RANKS = 32  # the deepest pipeline that is ordered
MAX_ORDERED = 3_000_000  # computations of all orders of a search
CLOSE = 1.002  # the Vs of a size end with one that is this close to the bound of the others
FAR = 1.06  # a choice is left when its step is that much longer than the best: other units change it by up to 5 percent
PAIR = 2  # micro-batches whose weight gradients are one product
LIMITS = (("zb_v", 4), ("zb_v", 2), ("zb_v", 0), ("v_half", 0), ("v_min", 0))  # by memory held: with extra warm-up
HELD = 0.7  # share of the forwards of a chunk that a rank may hold, which it does hold at some time in any order
_UNITS = (50, 12)  # the mean forward's time, in the units that state the times of passes
_TOO_DEEP = f"zero-bubble Vs of more than {MAX_RANKS} ranks, which only `estimate` orders"
_TOO_MANY = f"zero-bubble Vs after {MAX_ORDERED:,} ordered computations, where the search stops; `estimate` plans them"
_NONE_FITS = "no zero-bubble V fits"


class _Choice(NamedTuple):
    """What distinguishes the Vs of a size."""

    bound: float  # lower bound of the step's time
    memory: int  # position in LIMITS
    joint: int
    post_validation: bool


@dataclass
class Ordering:
    """The work that a search has spent on orders, and the Vs that it left out because of it."""

    computations: int = 0
    left_out: dict[str, Rejected] = field(default_factory=dict)  # the example is the one with the best bound
    least: dict[str, float] = field(default_factory=dict)  # its bound, by reason

    def leave_out(self, why: str, example: str, bound: float) -> None:
        """Count a V that is left out."""
        reject(self.left_out, why, example)
        if bound < self.least.get(why, float("inf")):
            self.least[why], self.left_out[why].example = bound, example

    @property
    def spent(self) -> bool:
        """Whether the search orders no more Vs."""
        return self.computations > MAX_ORDERED


@dataclass(frozen=True)
class VSize:
    """The zero-bubble Vs of one size with zb_v, or those that hold less, before any has an order."""

    run: RunConfig  # with zb_v
    layout: Layout
    less_memory: bool
    choices: tuple[_Choice, ...]  # lowest bound first
    enough: set[tuple[int, bool]]  # joint and post_validation that fit without recompute: less memory is of no use
    costs: tuple[list[StageCost], ...]  # without recompute, with weight gradients one by one and in pairs
    message: float

    @property
    def late(self) -> int:
        """Position in a search: Vs take longest, and those with less memory rarely win."""
        return 1 + self.less_memory

    @property
    def bound(self) -> float:
        """Lower bound of the step's time."""
        return self.choices[0].bound

    def fastest(
        self, gpu: Hardware, worst: float, ordering: Ordering, rejected: dict[str, Rejected]
    ) -> Estimate | None:
        """Return the fastest V that fits; None if none does, none beats `worst`, or the limits leave all out."""
        best: Estimate | None = None
        refused: dict[str, Rejected] = {}
        for choice in self.choices:
            if choice.bound >= min(worst, best.step.seconds / CLOSE if best else worst):
                break
            if choice[2:] in self.enough:
                continue
            if self._left_out(ordering):
                return best
            for found in self._ordered(gpu, choice, ordering, refused):
                known = min(worst, best.step.seconds) if best else worst
                if best is None or found.step.seconds < best.step.seconds:
                    best = found
                if set(layers_by_policy(found.step.job.stages)) == {"none"}:
                    self.enough.add(choice[2:])
                if best.step.seconds <= CLOSE * choice.bound or found.step.seconds > FAR * known:
                    break
        if best is None and refused:
            reject(rejected, _NONE_FITS, next(iter(refused.values())).example)
        return best

    def _left_out(self, ordering: Ordering) -> bool:
        why = _TOO_DEEP if self.layout.pp > MAX_RANKS else _TOO_MANY if ordering.spent else None
        if why:
            speed = self.layout.global_batch * self.run.data.seq_len / self.layout.world / self.bound
            name = words_of(self.run)
            name = name.replace("zb_v", "v_half or v_min") if self.less_memory else name
            ordering.leave_out(why, f"{name}: at most {speed:,.0f} tokens/s/GPU", self.bound)
        return why is not None

    def _ordered(
        self, gpu: Hardware, choice: _Choice, ordering: Ordering, rejected: dict[str, Rejected]
    ) -> Iterator[Estimate]:
        """Yield the estimates of a choice, ordered by the times of its passes in several units, and by equal ones."""
        name, extra = LIMITS[choice.memory]
        parallel = replace(
            self.run.parallel,
            schedule=name,
            extra_warmup=extra,
            joint_weight_gradients=choice.joint,
            post_validation=choice.post_validation,
        )

        def planned(times: tuple[int, ...] | None) -> Candidate | None:
            ranks, number = self.layout.pp, self.layout.accumulation
            ordering.computations += 6 * ranks * (number + 10 * min(number, 5 * ranks))
            run = replace(self.run, parallel=replace(parallel, pass_times=times))
            return candidate(run, self.layout.world, gpu, rejected)

        costs = self.costs[choice.joint - 1]
        for units in (*_UNITS, None):
            found = planned(self._times(costs, units) if units else None)
            if found is None:  # nor would another order fit, which holds about the same
                return
            if units and set(layers_by_policy(found.job.stages)) != {"none"}:
                costs = stage_costs(gpu, found.job)  # the times with recompute order what the memory holds
                found = planned(self._times(costs, units)) or found
            yield found.estimate(gpu)

    def _times(self, costs: Sequence[StageCost], units: int) -> tuple[int, ...]:
        unit = sum(cost.forward for cost in costs) / len(costs) / units
        return pass_times_of(costs, self.message, unit)


def v_sizes(run: RunConfig, world: int, gpu: Hardware, rejected: dict[str, Rejected]) -> list[VSize]:
    """Return the zero-bubble Vs of a size with their bounds: zb_v, and those that hold less. Empty if it allows none.

    Args:
        run: with the sizes of all axes, and schedule zb_v.
    """
    found = legal(run, world, gpu, rejected)
    if found is None:
        return []
    run, layout = found
    if layout.accumulation < layout.pp:
        example = f"{words_of(run)}: {layout.accumulation} micro-batches"
        reject(rejected, "fewer micro-batches than ranks of the pipeline, for a zero-bubble V", example)
        return []
    rooms = {early: _rooms(run, layout, gpu, early) for early in (True, False) if _is_legal(run, early)}
    if min(rooms[False]) <= 0:
        states = USABLE * gpu.memory_gib - min(rooms[False]) / GIB
        usable = f"{states:.1f} of the {USABLE * gpu.memory_gib:.1f} GiB that may be used"
        reject(rejected, TOO_LARGE, f"{words_of(run)}: {usable}")
        return []
    stages = [StagePolicies(("none",) * layers, 0, 0) for layers in run.parallel.partition or ()]
    run, job = with_chunks(gpu, run, job_of(run, layout, stages, gpu.dtype))
    pairs = replace(job, joint=PAIR, assumed_joint_share=job.micro_batches // PAIR * PAIR / job.micro_batches)
    single, paired = stage_costs(gpu, job), stage_costs(gpu, pairs)
    work = layer_work(run, layout, gpu.element_bytes)
    saved = {policy: work.saved_bytes(policy) for policy in POLICIES}
    choices = []
    for early, room in rooms.items():
        alone = _bounds(gpu, replace(job, post_validation=early), single, saved, room)
        choices += [_Choice(bound, memory, 1, early) for memory, bound in enumerate(alone)]
        together = _bounds(gpu, replace(pairs, post_validation=early), paired, saved, room)
        for memory, bound in enumerate(map(min, alone, together)):  # an order may leave some single
            choices.append(_Choice(bound, memory, PAIR, early))
    enough: set[tuple[int, bool]] = set()
    found_sizes = []
    for less in (False, True):
        own = sorted(one for one in choices if (LIMITS[one.memory][0] != "zb_v") == less)
        found_sizes.append(VSize(run, layout, less, tuple(own), enough, (single, paired), sum(stage_message(gpu, job))))
    return found_sizes


def _is_legal(run: RunConfig, post_validation: bool) -> bool:
    try:
        check(replace(run, parallel=replace(run.parallel, post_validation=post_validation)))
    except UserError:
        return False
    return True


def _rooms(run: RunConfig, layout: Layout, gpu: Hardware, post_validation: bool) -> list[float]:
    """Return the bytes that each rank has at most for saved activations: with the least buffers for messages."""
    run = replace(run, parallel=replace(run.parallel, schedule="dualpipe_v", post_validation=post_validation))
    layout = replace(layout, accumulation=max(layout.accumulation, 2 * layout.pp))
    return [USABLE * gpu.memory_bytes - rank.fixed for rank in rank_memory(run, layout, gpu.element_bytes)]


def _bounds(
    gpu: Hardware, job: StepJob, costs: list[StageCost], saved: dict[str, int], room: Sequence[float]
) -> list[float]:
    """Return lower bounds of the step's time for each of LIMITS."""
    residence = Residence.of(gpu, job, costs, saved)
    least = max(pipeline_bound(job, costs, sum(stage_message(gpu, job))), residence.with_room(room))
    equal = PassTimes.of(EQUAL_PASSES, 2 * job.pp)
    bounds = []
    for name, extra in LIMITS:
        limit = ZeroBubbleV(name, job.pp, job.micro_batches, extra, equal, job.joint).limit
        held = residence.with_held(HELD * min(limit, 2 * job.micro_batches), room)
        bounds.append(step_bound(gpu, job, costs, max(least, residence.with_limit(limit), held)))
    return bounds
