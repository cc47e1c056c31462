"""Peak memory of a rank: by `layout/rank_memory.py` for this stack's runs, by formulas for published runs.

A published program with P parameters on a rank holds 2 P bytes of weights, 2 P or 4 P of gradients and 12 P of
optimizer states (fp32 weights and two moments); ZeRO shards them over dp (Rajbhandari et al., arXiv 1910.02054,
section 5). Activations follow Korthikanti et al. (arXiv 2205.05198, equations 1 to 6), for all micro-batches in flight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from llama_ds.config.schema import RunConfig
from llama_ds.layout.layout import Layout
from llama_ds.layout.optimizer_states import ADAMW
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.layout.rank_memory import rank_memory
from llama_ds.layout.recompute import GIB, USABLE, StagePolicies
from llama_ds.layout.weights import Role
from llama_ds.perf.plan.job import StepJob
from llama_ds.perf.plan.step import rank_roles

CONTEXT_BYTES = 4.0 * GIB  # driver, buffers of NCCL and DeepSpeed, workspaces: nvidia-smi counts them, torch does not
FRAGMENTATION = 1.08  # memory of the caching allocator over the memory of tensors


@dataclass(frozen=True)
class Memory:
    """Bytes on the ranks of one pipeline position."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # saved between forward and backward, for all micro-batches in flight
    working: float  # temporaries of a layer or the head, and message buffers
    margin: float  # driver, communication library, fragmentation

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working + self.margin


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
        found.append(Memory(weights, gradients, optimizer, kept, held.working + gathered, (1 - USABLE) * device_bytes))
    return found


def published_memory(job: StepJob, reserved: bool) -> float:
    """Return the bytes on the fullest rank of a published run, as nvidia-smi shows them (`reserved`) or in tensors."""
    tensors = max(_published(job))
    return tensors * FRAGMENTATION + CONTEXT_BYTES if reserved else tensors


def _published(job: StepJob) -> list[float]:
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
        working = layer_activations(job, "none") * (2 if again else 1)  # activations and their gradients
        if len(job.stages) - 1 in own:
            working = max(working, job.program.kept_logits * job.tokens * job.vocab)
        found.append(_states(job, by_role) + kept + working)
    return found


def _states(job: StepJob, by_role: Counter[Role]) -> float:
    """Return the bytes of 16-bit weights, gradients and optimizer states, with fp32 copies of 16-bit gradients."""
    parameters = by_role.total()
    optimizer = ADAMW.nbytes(by_role, weight_bytes=2) + (4.0 * parameters if job.program.gradient_bytes == 2 else 0.0)
    optimizer /= job.dp if job.zero_stage else 1
    gradients = job.program.gradient_bytes * parameters / (job.dp if job.zero_stage >= 2 else 1)
    weights = 2.0 * parameters
    if job.zero_stage == 3:
        weights = weights / job.dp + 4.0 * parameters / max(1, job.model.num_hidden_layers)
    return weights + gradients + optimizer


def layer_activations(job: StepJob, policy: str) -> float:
    """Return the bytes that one layer saves for one micro-batch."""
    numbers = float(job.tokens) * job.model.hidden_size
    if job.program.gated and policy != "full":
        # Two norms; q, k, v before and after rotation; attention output; gate, up, SiLU, product.
        own = numbers / job.tp if job.sequence_parallel else numbers
        inner = 8.0 * job.tokens * job.model.intermediate_size / job.tp
        scores = float(job.tokens) * job.seq_len * job.model.num_attention_heads / job.tp
        scores *= job.program.kept_scores if policy == "none" else 0
        return 2 * job.program.kept_norm * own + 14 * numbers / job.tp + inner + scores
    if policy == "full":
        return 2 * numbers / (job.tp if job.program.gated and job.sequence_parallel else 1)
    masks = 0.0 if job.program.flash else 2.0  # two dropouts a layer
    replicated, sharded = (0.0, 32.0 + masks) if job.sequence_parallel else (8.0 + masks, 24.0)
    if not job.program.flash and policy != "selective":
        sharded += 5.0 * job.model.num_attention_heads * job.seq_len / job.model.hidden_size
    return numbers * (replicated + sharded / job.tp)
