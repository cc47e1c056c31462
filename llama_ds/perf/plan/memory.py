"""Peak memory of a rank: by `layout/rank_memory.py` for this stack's runs, by formulas for published runs.

A published program with P parameters on a rank holds 2 P bytes of weights, 2 P or 4 P of gradients (torch alone: once
activations have gone) and 12 P of optimizer states (fp32 weights and two moments); ZeRO shards them over dp
(Rajbhandari et al., arXiv 1910.02054, section 5). Activations follow Korthikanti et al. (arXiv 2205.05198, equations 1
to 6), for all micro-batches in flight. Those of LLaMA-like programs are counted
(`tests/perf/test_plan_counted_memory.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from llama_ds.config.schema import RunConfig
from llama_ds.layout.layout import Layout
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.layout.rank_memory import rank_memory
from llama_ds.layout.recompute import GIB, USABLE, StagePolicies
from llama_ds.layout.weights import Role
from llama_ds.perf.plan.job import OP, StepJob
from llama_ds.perf.plan.step import rank_roles

# What torch does not count: the driver's context, by messages of single GPUs that ran out of memory ("79.15 GiB of
# which 228.38 MiB is free", 78.93 in use, 76.28 and 2.14 of them by torch), and NCCL's buffers, 544 MiB for a
# communicator of two A100s and 688 MiB for one of more (NVIDIA/nccl issue 964). A program's own: `Program.buffers_gib`.
CONTEXT_BYTES = 0.5 * GIB
COMMUNICATOR_BYTES = 688 * 2**20
VISIBLE = 79.15 / 80  # share of a device's memory that programs can use, by the same messages
FRAGMENTATION = 1.08  # memory of the caching allocator over the memory of tensors, while there is enough
# When memory runs out, the allocator cannot use gaps: shares of the activations kept and of a layer's temporaries, by
# its rules for counted programs (docs/measurements/2026-11-30-planner-counted-memory.md), Megatron's and torch's alone.
MEGATRON_GAPS, TORCH_GAPS = (0.03, 0.47), (0.05, 0.14)


@dataclass(frozen=True)
class Memory:
    """Bytes on the ranks of one pipeline position."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # saved between forward and backward, for all micro-batches in flight
    working: float  # temporaries of a layer or the head, and message buffers
    margin: float  # driver, communication library, fragmentation
    matrices: float = 0.0  # whole matrices in Muon's step, when activations are gone (CUDA graphs': with them)

    @property
    def kept(self) -> float:
        """What the rank holds all the time, the margin included."""
        return self.weights + self.gradients + self.optimizer + self.margin

    @property
    def with_matrices(self) -> float:
        """What the rank holds in Muon's step."""
        return self.kept + self.matrices

    @property
    def total(self) -> float:
        """The most at one time."""
        return max(self.kept + self.activations + self.working, self.with_matrices)

    @property
    def at_peak(self) -> dict[str, float]:
        """What the rank holds when it holds most, by name."""
        absent = ("activations", "working") if self.total == self.with_matrices else ("matrices",)
        return {name: size for name, size in asdict(self).items() if name not in absent}


def run_memory(
    run: RunConfig, layout: Layout, policies: Sequence[StagePolicies], device_bytes: int, element_bytes: int = 2
) -> list[Memory]:
    """Return the memory of each pipeline rank for a run of this stack.

    ZeRO-2 also shards gradients over dp. ZeRO-3 also shards weights, and gathers those of two layers at a time.

    Args:
        policies: save policies of the model's stages, in order.
        device_bytes: memory of one GPU.
        element_bytes: bytes of an element in the run's dtype.
    """
    placement = schedule_of(run, layout).placement
    zero = run.zero_stage
    found = []
    for rank, held in enumerate(rank_memory(run, layout, element_bytes)):
        kept = sum(policies[placement.stage(rank, chunk)].saved_bytes for chunk in range(placement.chunks))
        weights, gathered = float(held.weights), 0.0
        layers = sum(len(policies[placement.stage(rank, chunk)].policies) for chunk in range(placement.chunks))
        if zero == 3:
            weights, gathered = weights / layout.data_axis, 2 * weights / max(1, layers)
        gradients = held.gradients / (layout.data_axis if zero >= 2 else 1) + (gathered if zero >= 2 else 0)
        optimizer = held.optimizer * (1 if zero else layout.data_axis)
        working, margin = held.working + gathered, (1 - USABLE) * device_bytes
        found.append(Memory(weights, gradients, optimizer, kept, working, margin, held.in_muon(kept)))
    return found


def published_memory(job: StepJob, reserved: bool) -> float:
    """Return the bytes on the fullest rank of a published run, as nvidia-smi shows them (`reserved`) or in tensors."""
    ranks = _published(job)
    if not reserved:
        return max(rank.tensors for rank in ranks)
    return max(max(rank.cached * FRAGMENTATION, rank.least) for rank in ranks) + _outside(job)


def needed_memory(job: StepJob) -> float:
    """Return the bytes of a device with which a published run is not out of memory."""
    return (max(rank.least for rank in _published(job)) + _outside(job)) / VISIBLE


def _outside(job: StepJob) -> float:
    """Return the bytes that torch does not count: communicators of each kind of group, and of all ranks."""
    groups = sum(size > 1 for size in (job.tp, job.pp, job.axes.data_axis))
    communicators = groups + 1 if groups else 0
    return CONTEXT_BYTES + COMMUNICATOR_BYTES * communicators + job.program.buffers_gib * GIB


class _Held(NamedTuple):
    """Bytes of a rank: states, activations, temporaries of a pass, and what only the optimizer's step holds."""

    states: float
    late: float  # gradients that the backward makes as activations go
    kept: float
    working: float
    of_layer: float  # temporaries without the head's
    gaps: float  # what the allocator cannot use when memory runs out
    step: float

    @property
    def tensors(self) -> float:
        """The largest sum at one time: activations have gone when late gradients are all there, and the step begins."""
        return self.states + max(self.kept + self.working, self.late + max(self.of_layer, self.step))

    @property
    def least(self) -> float:
        """What the allocator needs."""
        return self.tensors + self.gaps

    @property
    def cached(self) -> float:
        """What the allocator keeps: the step's long buffers do not fit into the activations' freed blocks."""
        return self.states + max(self.kept + self.working, self.late + self.of_layer) + self.step


def _published(job: StepJob) -> list[_Held]:
    full = max(job.micro_batches, 2 * job.pp)
    schedule = job.plan(min(full, 3 * job.pp + full % job.pp))  # more micro-batches do not need more memory
    boundary = 2.0 * job.tokens * job.model.hidden_size
    found = []
    for rank, by_role in enumerate(rank_roles(job)):
        own = [schedule.placement.stage(rank, chunk) for chunk in range(schedule.placement.chunks)]
        kept = 0.0
        for chunk, stage in enumerate(own):
            held = max(sum(at) for at in schedule.held[rank][chunk])
            kept += held * sum(n * layer_activations(job, policy) for policy, n in job.stages[stage])
            kept += held * (boundary * job.program.keeps_outputs * (job.pp > 1) + _kept_input(job, first=stage == 0))
        again = any(policy == "full" for stage in own for policy, _ in job.stages[stage])
        working = of_layer = _layer_working(job, again)
        of_kept, of_working = TORCH_GAPS if job.program.plain_torch else MEGATRON_GAPS
        gaps = of_kept * kept + of_working * working
        if len(job.stages) - 1 in own:
            working = max(working, _head_working(job))
        # An optimizer of fp32 weights casts 16-bit gradients to fp32.
        casts = job.program.gradient_bytes == 2 and job.program.state_bytes > 4
        updated = by_role.total() / (job.state_group.size if job.zero_stage else 1)
        step = (job.program.step_bytes + 4 * casts) * updated
        states, gradients = _states(job, by_role) + _shared_buffer(job), _gradients(job, by_role)
        replicas = job.zero_stage < 2 and job.axes.data_axis > 1  # DDP has buckets of all gradients from the start
        made_late = job.program.plain_torch and job.micro_batches == 1 and not replicas
        states, late = (states, gradients) if made_late else (states + gradients, 0.0)
        found.append(_Held(states, late, kept, working, of_layer, gaps, step))
    return found


def _own_numbers(job: StepJob) -> float:
    """Return the elements of activations between layers that a rank has of a micro-batch."""
    return float(job.tokens) * job.model.hidden_size / (job.tp if job.sequence_parallel else 1)


def _all_scores(job: StepJob) -> float:
    """Return the elements of a rank's attention scores of a micro-batch, none with fused attention."""
    return 0.0 if job.program.flash else float(job.tokens) * job.seq_len * job.model.num_attention_heads / job.tp


def _kept_input(job: StepJob, first: bool) -> float:
    """Return the bytes of a stage's input for a micro-batch that are kept besides what its layers keep."""
    if not job.program.gated:
        return 0.0
    layer_keeps_it = job.program.kept_norm <= 4 or any(policy == "full" for policy, _ in job.stages[0])
    if not first:
        return 0.0 if layer_keeps_it else 2 * _own_numbers(job)
    # A rank's part of the embedding's output is a view of the whole (Megatron-LM until December 2023).
    viewed = job.program.sequence_first and layer_keeps_it
    return 2 * (float(job.tokens) * job.model.hidden_size - _own_numbers(job)) if viewed else 0.0


def _shared_buffer(job: StepJob) -> float:
    """Return the bytes of the buffer into which Megatron-LM gathers inputs of products, and computes scores."""
    if not (job.program.gated and job.program.sequence_first):
        return 0.0
    gathered = float(job.tokens) * job.model.hidden_size if job.sequence_parallel else 0.0
    return 2 * max(gathered, _all_scores(job))


def _states(job: StepJob, by_role: Counter[Role]) -> float:
    """Return the bytes of 16-bit weights and optimizer states."""
    parameters, ranks = by_role.total(), job.state_group.size
    optimizer = job.program.state_bytes * parameters / (ranks if job.zero_stage else 1)
    weights = 2.0 * parameters
    if job.zero_stage == 3:  # its share, and two layers' gathered weights
        ends = by_role[Role.EMBEDDING] + by_role[Role.HEAD] if job.program.plain_torch else 0
        weights = weights / ranks + 2.0 * ends + 4.0 * (parameters - ends) / max(1, job.model.num_hidden_layers)
    return weights + optimizer


def _gradients(job: StepJob, by_role: Counter[Role]) -> float:
    return job.program.gradient_bytes * by_role.total() / (job.state_group.size if job.zero_stage >= 2 else 1)


def _head_working(job: StepJob) -> float:
    """Return the most bytes that the last norm, the head and the loss need."""
    logits = job.program.kept_logits * job.tokens * job.vocab
    if not job.program.gated:
        return logits
    own = _own_numbers(job)
    return job.program.kept_norm * own + max(logits, job.program.norm_working * own)


def _layer_working(job: StepJob, again: bool) -> float:
    """Return the most bytes that passes of one layer need besides what layers keep between forward and backward.

    A layer's backward frees what the layer kept, from its end to its beginning: the MLP, then its norm, then attention.

    Args:
        again: whether a backward begins with the forward again; the layer's output then stays until it has ended.
    """
    program, own = job.program, _own_numbers(job)
    whole = float(job.tokens) * job.model.hidden_size
    inner = float(job.tokens) * job.model.intermediate_size / job.tp
    computed = layer_activations(job, "none") if again else 0.0
    if not program.gated:
        return computed + 2 * whole + 4 * max(inner, _all_scores(job))
    if again and program.kept_norm <= 4:
        computed -= 2 * own  # the layer's input, which is kept already
    weight = 2.0 * job.model.hidden_size * job.model.intermediate_size / job.tp  # its gradient in 16 bits
    if job.zero_stage == 3:
        weight = 0.0  # those of two layers are among the states
    repeated = any(policy == "selective" for stage in job.stages for policy, _ in stage)
    scores = program.scores_working + (program.kept_scores if repeated else 0)
    freed = program.kept_inner * inner
    passed = 2 * own * (1 + again)  # gradient of the layer's output, and the output
    gathered = 2 * whole if job.sequence_parallel else 0.0
    return computed + max(
        passed + gathered + 2 * inner + weight,  # gradients: those of the last product's input and weight
        passed + 4 * inner,  # those of gate and up, while the product gives way to one of them
        passed + 2 * own + 4 * inner + gathered + 2 * weight - freed,  # also those of their input and weights
        passed + program.norm_working * own - freed,
        scores * _all_scores(job) - 2 * own * (not again) - freed,  # attention's forward
    )


def layer_activations(job: StepJob, policy: str) -> float:
    """Return the bytes that one layer saves for one micro-batch."""
    numbers = float(job.tokens) * job.model.hidden_size
    own = _own_numbers(job)
    if policy == OP:  # input and output, q and v, attention output, gate
        heads = 2 + job.model.num_key_value_heads / job.model.num_attention_heads
        inner = float(job.tokens) * job.model.intermediate_size
        return 2 * (2 * own + (heads * numbers + inner) / job.tp)
    if job.program.gated and policy != "full":
        # Two norms; rotated q and k, v and the attention's output; gate, up, SiLU, product.
        inner = job.program.kept_inner * job.tokens * job.model.intermediate_size / job.tp
        scores = job.program.kept_scores * _all_scores(job) if policy == "none" else 0.0
        return 2 * job.program.kept_norm * own + _kept_heads(job, policy) + inner + scores
    if policy == "full":
        return 2 * numbers / (job.tp if job.program.gated and job.sequence_parallel else 1)
    masks = 0.0 if job.program.flash else 2.0  # two dropouts a layer
    replicated, sharded = (0.0, 32.0 + masks) if job.sequence_parallel else (8.0 + masks, 24.0)
    if not job.program.flash and policy != "selective":
        sharded += 5.0 * job.model.num_attention_heads * job.seq_len / job.model.hidden_size
    return numbers * (replicated + sharded / job.tp)


def _kept_heads(job: StepJob, policy: str) -> float:
    """Return the bytes of queries, keys, values and attention's output that a gated layer keeps.

    Fused attention keeps the logarithm of each row's sum in fp32. In Megatron-LM's order it copies its output into that
    of the next product, unless there is one row. Without fused attention, with one row or where attention is computed
    again, values are a view of the product of all three, so that queries and keys stay in it besides the rotated ones.
    """
    heads = job.model.num_attention_heads
    values = job.model.num_key_value_heads / heads
    kept = 4 + 4 * values
    if job.program.sequence_first and job.program.flash and job.micro_batch > 1:
        kept += 2
    if job.program.sequence_first and not job.program.flash and (job.micro_batch == 1 or policy == "selective"):
        kept += 2 + 2 * values
    sums = 4 * heads if job.program.flash else 0
    return job.tokens * (kept * job.model.hidden_size + sums) / job.tp
