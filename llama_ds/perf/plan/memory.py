"""Peak memory of a rank: by `layout/rank_memory.py` for this stack's runs, by formulas for published runs.

A published program with P parameters on a rank holds 2 P bytes of weights, 2 P or 4 P of gradients and 12 P of
optimizer states (fp32 weights and two moments); ZeRO shards them over dp (Rajbhandari et al., arXiv 1910.02054,
section 5). Activations follow Korthikanti et al. (arXiv 2205.05198, equations 1 to 6), for all micro-batches in flight.
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

# Driver, workspaces and buffers of NCCL, without those that a program allocates itself (`Program.buffers_gib`):
# nvidia-smi counts them, torch does not.
CONTEXT_BYTES = 2.0 * GIB
FRAGMENTATION = 1.08  # memory of the caching allocator over the memory of tensors, while there is enough
TIGHT_FRAGMENTATION = 1.03  # when memory runs out, after the allocator has released the blocks that it only keeps


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
    return max(rank.kept for rank in ranks) * FRAGMENTATION + _outside(job)


def needed_memory(job: StepJob) -> float:
    """Return the bytes of a device with which a published run is not out of memory."""
    return max(rank.tensors for rank in _published(job)) * TIGHT_FRAGMENTATION + _outside(job)


def _outside(job: StepJob) -> float:
    return CONTEXT_BYTES + job.program.buffers_gib * GIB


class _Held(NamedTuple):
    """Bytes of a rank: states, activations with temporaries, and what only the optimizer's step holds."""

    states: float
    activations: float
    step: float

    @property
    def tensors(self) -> float:
        """The largest sum at one time: the activations have gone when the step begins."""
        return self.states + max(self.activations, self.step)

    @property
    def kept(self) -> float:
        """What the allocator keeps: the step's long buffers do not fit into the activations' freed blocks."""
        return self.states + self.activations + self.step


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
            kept += held * boundary * job.program.keeps_outputs * (job.pp > 1)
        again = any(policy == "full" for stage in own for policy, _ in job.stages[stage])
        working = layer_activations(job, "none") if again else 0.0
        working += _layer_gradients(job)
        if len(job.stages) - 1 in own:
            working = max(working, job.program.kept_logits * job.tokens * job.vocab)
        # An optimizer of fp32 weights casts 16-bit gradients to fp32.
        casts = job.program.gradient_bytes == 2 and job.program.state_bytes > 4
        copies = 4.0 * by_role.total() / (job.state_group.size if job.zero_stage else 1)
        found.append(_Held(_states(job, by_role), kept + working, copies if casts else 0.0))
    return found


def _states(job: StepJob, by_role: Counter[Role]) -> float:
    """Return the bytes of 16-bit weights, gradients and optimizer states."""
    parameters, ranks = by_role.total(), job.state_group.size
    optimizer = job.program.state_bytes * parameters / (ranks if job.zero_stage else 1)
    gradients = job.program.gradient_bytes * parameters / (ranks if job.zero_stage >= 2 else 1)
    weights = 2.0 * parameters
    if job.zero_stage == 3:
        weights = weights / ranks + 4.0 * parameters / max(1, job.model.num_hidden_layers)
    return weights + gradients + optimizer


def _layer_gradients(job: StepJob) -> float:
    """Return the bytes of a layer's gradients that exist at one time: of two sets of scores, or of inner values."""
    model = job.model
    inner = (6.0 if job.program.gated else 4.0) * job.tokens * model.intermediate_size / job.tp
    scores = 0.0 if job.program.flash else 4.0 * job.tokens * job.seq_len * model.num_attention_heads / job.tp
    return 2.0 * job.tokens * model.hidden_size + max(inner, scores)


def layer_activations(job: StepJob, policy: str) -> float:
    """Return the bytes that one layer saves for one micro-batch."""
    numbers = float(job.tokens) * job.model.hidden_size
    own = numbers / job.tp if job.sequence_parallel else numbers
    if policy == OP:  # input and output, q and v, attention output, gate
        heads = 2 + job.model.num_key_value_heads / job.model.num_attention_heads
        inner = float(job.tokens) * job.model.intermediate_size
        return 2 * (2 * own + (heads * numbers + inner) / job.tp)
    if job.program.gated and policy != "full":
        # Two norms; rotated q and k, v and the attention's output; gate, up, SiLU, product.
        inner = job.program.kept_inner * job.tokens * job.model.intermediate_size / job.tp
        scores = float(job.tokens) * job.seq_len * job.model.num_attention_heads / job.tp
        scores *= job.program.kept_scores if policy == "none" else 0
        heads = 4 + 4 * job.model.num_key_value_heads / job.model.num_attention_heads
        return 2 * job.program.kept_norm * own + heads * numbers / job.tp + inner + scores
    if policy == "full":
        return 2 * numbers / (job.tp if job.program.gated and job.sequence_parallel else 1)
    masks = 0.0 if job.program.flash else 2.0  # two dropouts a layer
    replicated, sharded = (0.0, 32.0 + masks) if job.sequence_parallel else (8.0 + masks, 24.0)
    if not job.program.flash and policy != "selective":
        sharded += 5.0 * job.model.num_attention_heads * job.seq_len / job.model.hidden_size
    return numbers * (replicated + sharded / job.tp)
