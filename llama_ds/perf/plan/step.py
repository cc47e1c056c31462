"""Time of one optimizer step: event simulation of the pipeline schedule, then gradient reduction and optimizer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from llama_ds.layout.flops import embedding_parameters, flops_per_token
from llama_ds.layout.partition import held_parameters
from llama_ds.layout.weights import Role, weights
from llama_ds.perf.plan.communication import (
    RankGroup,
    all_gather,
    all_reduce,
    contention,
    exchange,
    message,
    reduce_scatter,
    ring_latency,
)
from llama_ds.perf.plan.compute import pointwise
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import Counts, StepJob
from llama_ds.perf.plan.layer import LayerTime, Parts, embedding_time, head_time, layer_time
from llama_ds.perf.plan.rank_spread import slowdown
from llama_ds.perf.plan.step_ends import ChunkEnds, chunk_ends, exposed_gather, exposed_reduction
from llama_ds.perf.plan.update import update_time
from llama_ds.schedules.leading import time_between_steps
from llama_ds.schedules.schedule import IN_A_V, defers
from llama_ds.schedules.simulate import StageCost, simulate

_LONG = 1e9  # seconds: longer than any pass


@dataclass(frozen=True)
class StageTime:
    """Times of one stage's passes for one micro-batch."""

    forward: Parts
    recompute: Parts
    input_backward: Parts
    weight_backward: Parts

    @property
    def whole(self) -> Parts:
        """All passes together."""
        return self.forward + self.recompute + self.input_backward + self.weight_backward

    @property
    def launch_bound(self) -> bool:
        """Whether the host takes longer to launch a pass than the GPU to run it."""
        back = self.recompute + self.input_backward + self.weight_backward
        return any(part.host > part.device for part in (self.forward, back))

    def cost(self, launch_blocking: bool = False) -> StageCost:
        """Return the costs for the simulation: the longer of GPU and host time, with recompute in the backward."""
        join = sum if launch_blocking else max
        back = self.recompute + self.input_backward + self.weight_backward
        backward = join((back.device, back.host))
        weights = min(self.weight_backward.device, backward)
        return StageCost(join((self.forward.device, self.forward.host)), backward - weights, weights)


@dataclass(frozen=True)
class StepTime:
    """Time of a step in seconds, and its components."""

    job: StepJob
    stages: tuple[StageTime, ...]
    pipeline: float  # first forward to last backward, simulated
    bubble: float  # share of the pipeline time in which ranks wait
    reduction: float  # exposed time of gradient reduction and weight gather
    optimizer: float
    host: float
    transfer: float  # link time of one message between stages
    stragglers: float = 0.0  # part of the pipeline's time in which ranks wait for slower ones (`rank_spread.py`)

    @property
    def seconds(self) -> float:
        return self.pipeline + self.reduction + self.optimizer + self.host

    @property
    def tokens_per_second(self) -> float:
        """Throughput of one GPU."""
        return self.job.rows * self.job.seq_len / self.seconds / self.job.ranks

    def mfu(self, gpu: Hardware) -> float:
        """Return the model FLOPs utilization by `layout/flops.py`: causal attention, no recompute."""
        job = self.job
        return self.tokens_per_second * flops_per_token(job.model, job.seq_len, job.documents.keys) / gpu.peak


def step_time(gpu: Hardware, job: StepJob) -> StepTime:
    """Return the time of one step."""
    stages = stage_times(gpu, job)
    transfer, wait = stage_message(gpu, job)
    costs = stage_costs(gpu, job, stages)
    if job.program.blocking_sends and job.pp > 1:
        costs = [StageCost(c.forward + transfer, c.input_backward + transfer, c.weight_backward) for c in costs]
        transfer, wait = 0.0, 0.0
    pipeline, bubble = run_schedule(job, tuple(costs), transfer, wait)
    factor = oversubscription(gpu, job)
    if factor > 1:  # waiting ranks free their processors, so only the work scales, not the bubble
        pipeline = max(pipeline, factor * (1 - bubble) * pipeline)
    if not job.whole_model:
        return StepTime(job, stages, pipeline, bubble, 0.0, 0.0, 0.0, transfer)
    stragglers = pipeline * (slowdown(gpu, job.ranks) - 1)
    reduction, optimizer = end_of_step(gpu, job, costs, _ends(job, costs))
    host = gpu.calibration.step_ms * 1e-3
    pipeline += stragglers
    return StepTime(job, stages, pipeline, bubble, reduction, factor * optimizer, host, transfer, stragglers)


def oversubscription(gpu: Hardware, job: StepJob) -> float:
    """Return the CPU oversubscription factor of a node, 1 if all its ranks run at full speed."""
    return max(1.0, min(job.ranks, gpu.links.gpus_per_node) / (gpu.at_once or gpu.links.gpus_per_node))


def stage_times(gpu: Hardware, job: StepJob) -> tuple[StageTime, ...]:
    """Return the times of every stage's passes."""
    last = len(job.stages) - 1
    known: dict[tuple[Counts, bool, bool, float], StageTime] = {}  # most stages are alike
    keys = [(counts, stage == 0, stage == last, job.joint_share(stage)) for stage, counts in enumerate(job.stages)]
    for stage, key in enumerate(keys):
        if key in known:
            continue
        counts, _, _, joint = key
        pieces: list[tuple[LayerTime, int]] = [(layer_time(gpu, job, policy, joint), n) for policy, n in counts]
        if job.whole_model and stage == 0:
            pieces.append((embedding_time(gpu, job), 1))
        if job.whole_model and stage == last:
            pieces.append((head_time(gpu, job), 1))
        # Beside the gather of the gradient that a stage receives, nothing is computed.
        received = max((piece.ahead for piece, n in pieces if n), default=0.0)
        outside = [_host(gpu, job, stage) + copies for copies in _graph_copies(gpu, job)]
        totals = [outside[0] + _mask(gpu, job, stage), Parts(), outside[1] + Parts(tensor=received), Parts()]
        for piece, n in pieces:
            parts = (piece.forward, piece.recompute, piece.input_backward, piece.weight_backward)
            totals = [total + part * n for total, part in zip(totals, parts, strict=True)]
        known[key] = StageTime(*totals)
    return tuple(known[key] for key in keys)


def _graph_copies(gpu: Hardware, job: StepJob) -> tuple[Parts, Parts]:
    """Return the copies at the ends of a stage whose layers are CUDA graphs: input, and gradients of both ends."""
    if not job.cuda_graphs or gpu.host_computes:
        return Parts(), Parts()
    launch, start = gpu.calibration.launch_us * 1e-6, gpu.calibration.kernel_us * 1e-6
    moved = 2.0 * job.program.element_bytes * job.tokens * job.model.hidden_size
    return (
        Parts(pointwise=start + pointwise(gpu, moved), host=launch),
        Parts(pointwise=2 * (start + pointwise(gpu, moved, "backward")), host=2 * launch),
    )


def _host(gpu: Hardware, job: StepJob, stage: int) -> Parts:
    """Return the host time of a stage outside its decoder layers, in each direction."""
    kernels = job.program.kernels_message if job.pp > 1 else 0
    kernels += job.program.kernels_ends * ((stage == 0) + (stage == len(job.stages) - 1)) if job.whole_model else 0
    return Parts(host=kernels * gpu.calibration.launch_us * 1e-6)


def _mask(gpu: Hardware, job: StepJob, stage: int) -> Parts:
    """Return the time in which the host builds a mask, for which a GPU waits at the ends of a pipeline."""
    ends = stage in (0, len(job.stages) - 1)
    launches = job.program.mask_launches * job.seq_len**2 if job.whole_model and ends else 0.0
    return Parts(pointwise=launches * gpu.calibration.launch_us * 1e-6)


def stage_costs(gpu: Hardware, job: StepJob, stages: tuple[StageTime, ...] | None = None) -> list[StageCost]:
    """Return every stage's costs for the simulation, including the ZeRO-2 and ZeRO-3 collectives of a micro-batch.

    Args:
        stages: the stages' times, if already computed.
    """
    costs = [stage.cost(job.launch_blocking or gpu.host_computes) for stage in stages or stage_times(gpu, job)]
    if job.zero_stage < 2:
        return costs
    return [_with_zero(gpu, job, stage, cost) for stage, cost in enumerate(costs)]


def stage_message(gpu: Hardware, job: StepJob) -> tuple[float, float]:
    """Return (transfer, latency) of hidden states between stages."""
    if job.pp == 1:
        return 0.0, 0.0
    size = float(job.program.element_bytes) * job.tokens * job.model.hidden_size
    split = job.sequence_parallel or job.program.name.startswith("megatron")
    transfer, wait = message(gpu, job.axes.stride("pp"), size / job.tp if split else size, job.ranks)
    if split and not job.sequence_parallel:
        transfer += all_gather(gpu, job.group("tp"), size)
    return transfer, wait


@lru_cache(maxsize=50_000)
def run_schedule(job: StepJob, costs: tuple[StageCost, ...], transfer: float, wait: float) -> tuple[float, float]:
    """Return (length, bubble) of the schedule; with `post_validation` the length is the time from step to step.

    In the steady state every period of micro-batches takes the same time, so long steps are simulated with fewer
    micro-batches and extrapolated. Orders that are computed are not quite periodic, so that several periods of them are
    averaged.
    """
    period, short = job.period, _short(job)
    longer = 9 * period if job.schedule in IN_A_V else short + period
    if job.micro_batches <= longer + period:
        length = _length(job, job.micro_batches, costs, transfer, wait)
        return length, _bubble(job, costs, length)
    rest = job.micro_batches % period
    first = _length(job, short + rest, costs, transfer, wait)
    second = _length(job, longer + rest, costs, transfer, wait)
    length = second + (second - first) * (job.micro_batches - longer - rest) / (longer - short)
    return length, _bubble(job, costs, length)


def _short(job: StepJob) -> int:
    """Return a number of micro-batches that fills the pipeline."""
    if job.schedule in IN_A_V:
        return (8 if job.schedule == "dualpipe_v" else 4) * job.period
    return 3 * job.period


def _bubble(job: StepJob, costs: tuple[StageCost, ...], length: float) -> float:
    busy = sum(c.forward + c.input_backward + c.weight_backward for c in costs) * job.micro_batches
    return max(0.0, 1 - busy / (length * job.pp))


def _length(job: StepJob, micro_batches: int, costs: tuple[StageCost, ...], transfer: float, wait: float) -> float:
    plan = job.plan(micro_batches)
    if job.post_validation:
        return time_between_steps(plan, costs, transfer, wait)
    return simulate(plan, costs, transfer, wait).length


def stage_roles(job: StepJob) -> list[Counter[Role]]:
    """Return the parameters of each stage on one rank, by role."""
    return held_parameters(job.model, job.layers, job.tp, job.vocab if job.whole_model else None, job.program.gated)


def rank_roles(job: StepJob) -> list[Counter[Role]]:
    """Return the parameters on a rank of each pipeline position, by role."""
    placement = job.placement
    held: list[Counter[Role]] = [Counter() for _ in range(job.pp)]
    for stage, by_role in enumerate(stage_roles(job)):
        held[placement.home(stage)[0]] += by_role
    return held


def rank_parameters(job: StepJob) -> list[int]:
    """Return the parameters on a rank of each pipeline position."""
    return [by_role.total() for by_role in rank_roles(job)]


def _ends(job: StepJob, costs: list[StageCost]) -> list[list[ChunkEnds]]:
    """Return the ends of the step of every rank's chunks, which do not depend on the number of micro-batches."""
    plan, layers = job.plan(min(job.micro_batches, _short(job) + job.micro_batches % job.period)), job.layers
    found = []
    for rank in range(job.pp):
        own = [plan.placement.stage(rank, chunk) for chunk in range(plan.placement.chunks)]
        found.append(chunk_ends(plan.computations(rank), [costs[s] for s in own], [layers[s] for s in own], job.joint))
    return found


def _least_ends(job: StepJob, costs: list[StageCost]) -> list[list[ChunkEnds]]:
    """Return ends that hide no less than those of any order of the passes."""
    layers = job.layers
    if job.chunks == 1:
        deferred = defers(job.schedule, job.joint)
        return [
            [ChunkEnds(max(1, n), 0.0, c.forward, _LONG if deferred else c.input_backward + c.weight_backward, 0.0)]
            for n, c in zip(layers, costs, strict=True)
        ]
    held = [0] * job.pp
    for stage, count in enumerate(layers):
        held[job.placement.home(stage)[0]] += max(1, count)
    return [[ChunkEnds(count, 0.0, _LONG, _LONG, 0.0)] for count in held]


def end_of_step(
    gpu: Hardware, job: StepJob, costs: list[StageCost], ends: list[list[ChunkEnds]] | None = None
) -> tuple[float, float]:
    """Return (exposed reduction, optimizer) of the rank with the longest sum; without `ends`, lower bounds of both."""
    share, ends = contention(gpu, job.data_group), ends or _least_ends(job, costs)
    placement, program = job.placement, job.program
    outer = {placement.home(stage)[0] for stage in (0, placement.stages - 1)}
    tied_ranks = outer if job.model.tie_word_embeddings and len(outer) > 1 else set()
    found = []
    for rank, by_role in enumerate(rank_roles(job)):
        parameters = by_role.total()
        update = update_time(gpu, job, rank, by_role).seconds
        if job.zero_stage < 2:
            update += _copies_into_buckets(gpu, job, parameters)
            update += pointwise(gpu, program.end_passes * parameters, "optimizer")
        scatter = _reduction(gpu, job, parameters)
        gather = _gather(gpu, job, parameters) if job.zero_stage else 0.0 if _sums_at_end(job) else scatter
        if job.zero_stage >= 2:  # already part of every micro-batch
            counted = job.zero_stage == 3 or program.overlaps_reduction or program.waits_for_reduction
            scatter = 0.0 if counted else scatter
            gather = 0.0 if job.zero_stage == 3 else gather
        if program.overlaps_reduction and not _sums_at_end(job):
            scatter = exposed_reduction(ends[rank], scatter, share)
            gather = gather if program.broadcasts else exposed_gather(ends[rank], gather, share)
        tied = 0.0
        if rank in tied_ranks:  # all-reduce of the tied embedding gradient over both ends of the pipeline
            pair = RankGroup(2, job.axes.stride("pp"))
            tied = all_reduce(gpu, pair, float(program.reduced_bytes) * embedding_share(job))
        found.append((scatter + gather + tied, update))
    return max(found, key=sum)


def _sums_at_end(job: StepJob) -> bool:
    return job.program.sums_at_end and job.pp == 1 and job.zero_stage < 2


def _reduction(gpu: Hardware, job: StepJob, parameters: int) -> float:
    """Return the time to reduce the gradients of a rank's parameters over the data-parallel ranks."""
    group, states, near = job.data_group, job.state_group, job.exchanged
    size = float(job.program.reduced_bytes) * parameters
    if _sums_at_end(job) or (job.program.broadcasts and job.zero_stage == 1):
        return all_reduce(gpu, group, size)
    if near:
        far = RankGroup(group.size // near, group.stride * near)
        return reduce_scatter(gpu, RankGroup(near, group.stride), 4.0 * parameters) + exchange(gpu, far, size / near)
    return reduce_scatter(gpu, states, size) + all_reduce(gpu, job.copies_group, size / states.size)


def _gather(gpu: Hardware, job: StepJob, parameters: int) -> float:
    """Return the time to pass a rank's updated weights to the data-parallel ranks."""
    states = job.state_group
    seconds = all_gather(gpu, states, float(job.program.element_bytes) * parameters)
    if job.program.broadcasts and job.zero_stage == 1:
        senders = min(states.size, sum(1 for _ in weights(job.model)))
        seconds += (senders - 1) * ring_latency(gpu, states)
    return seconds


def embedding_share(job: StepJob) -> float:
    """Return the elements of the embedding shard on one rank."""
    return job.vocab / max(1, job.model.vocab_size) * embedding_parameters(job.model)


def _with_zero(gpu: Hardware, job: StepJob, stage: int, cost: StageCost) -> StageCost:
    """Return the costs with the ZeRO-2 and ZeRO-3 collectives of every micro-batch, overlapped with the computation.

    ZeRO-3 all-gathers a layer's 16-bit weights for each pass and reduce-scatters its gradients; ZeRO-2 only does the
    latter (Rajbhandari et al., arXiv 1910.02054, section 7). The first layer's all-gather is exposed. Where only some
    data-parallel ranks share the states, each sums its part of the gradients with its copies.
    """
    group, copies, links = job.state_group, job.copies_group, job.program.shared_links
    parameters, layers = stage_roles(job)[stage].total(), job.layers[stage] or 1
    weights, gradients = (
        float(size) * parameters / layers for size in (job.program.element_bytes, job.program.reduced_bytes)
    )
    gather = layers * all_gather(gpu, group, weights, links) if job.zero_stage == 3 else 0.0
    scatter = layers * reduce_scatter(gpu, group, gradients, links)
    summed = layers * all_reduce(gpu, copies, gradients / group.size)
    share = contention(gpu, group)
    forward = _overlapped(cost.forward, gather, share * gather) + gather / layers
    backward, sent = cost.input_backward + cost.weight_backward, gather + scatter + summed
    disturbed = share * (gather + scatter) + contention(gpu, copies) * summed
    whole = _overlapped(backward, sent, disturbed) + (scatter + summed) / layers
    if job.program.waits_for_reduction:
        whole = backward + sent
    whole += _copies_into_buckets(gpu, job, parameters)
    return StageCost(forward, whole - cost.weight_backward, cost.weight_backward)


def _copies_into_buckets(gpu: Hardware, job: StepJob, parameters: int) -> float:
    """Return the time in which gradients are copied and divided around their reduction."""
    return pointwise(gpu, job.program.step_copies * parameters, "optimizer") if job.data_group.size > 1 else 0.0


def _overlapped(compute: float, communicate: float, disturbed: float) -> float:
    """Return the time of overlapping computation and communication: the longer of both, plus contention.

    `disturbed` is what the communication costs the computation if all of it is hidden.
    """
    return max(compute, communicate) + disturbed * min(1.0, compute / communicate if communicate else 0.0)
