"""Peak memory of a rank: of this stack's runs by `layout/rank_memory.py`, of published runs by formulas.

Published programs with P parameters on a rank hold 2 P weights, 2 P or 4 P gradients, 12 P optimizer (fp32 weights and
two moments), whichever ZeRO cuts by dp (Rajbhandari et al., arXiv 1910.02054, section 5), and activations by
Korthikanti et al. (arXiv 2205.05198, equations 1 to 6), for the micro-batches that the schedule holds.
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

CONTEXT_BYTES = 4.0 * GIB  # driver, NCCL's and DeepSpeed's buffers, workspaces: what nvidia-smi adds to tensors
FRAGMENTATION = 1.08  # what the caching allocator holds over what tensors need


@dataclass(frozen=True)
class Memory:
    """Bytes on the ranks of one pipeline position."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # kept between forward and backward, for all micro-batches in flight
    working: float  # within a layer or the head, and messages
    margin: float  # driver, communication library, fragmentation

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working + self.margin


def run_memory(
    run: RunConfig, layout: Layout, policies: Sequence[StagePolicies], device_bytes: int, element_bytes: int = 2
) -> list[Memory]:
    """Return the memory of each pipeline rank of one of this stack's runs, whose stages have these policies.

    ZeRO-2 cuts gradients by dp too and ZeRO-3 weights, which then exist whole for two layers at a time.

    Args:
        policies: save policies of the model's stages, in order.
        device_bytes: memory of one GPU.
        element_bytes: bytes of a number in the dtype that the run computes in.
    """
    place = schedule_of(run, layout).place
    zero = run.zero_stage
    found = []
    for rank, held in enumerate(rank_memory(run, layout, element_bytes)):
        kept = sum(policies[place.stage(rank, chunk)].saved_bytes for chunk in range(place.chunks))
        weights, gathered = float(held.weights), 0.0
        layers = sum(len(policies[place.stage(rank, chunk)].policies) for chunk in range(place.chunks))
        if zero == 3:
            weights, gathered = weights / layout.dp, 2 * weights / max(1, layers)
        gradients = held.gradients / (layout.dp if zero >= 2 else 1) + (gathered if zero >= 2 else 0)
        optimizer = held.optimizer * (1 if zero else layout.dp)
        found.append(Memory(weights, gradients, optimizer, kept, held.working + gathered, (1 - USABLE) * device_bytes))
    return found


def published_memory(job: StepJob, reserved: bool) -> float:
    """Return the bytes on the fullest rank of a published run: as nvidia-smi shows them (`reserved`), or of tensors."""
    tensors = max(_published(job))
    return tensors * FRAGMENTATION + CONTEXT_BYTES if reserved else tensors


def _published(job: StepJob) -> list[float]:
    full = max(job.micro_batches, 2 * job.pp)
    schedule = job.plan(min(full, 3 * job.pp + full % job.pp))  # what ranks hold does not grow with more
    boundary = 2.0 * job.tokens * job.model.hidden_size
    found = []
    for rank, by_role in enumerate(rank_roles(job)):
        own = [schedule.place.stage(rank, chunk) for chunk in range(schedule.place.chunks)]
        kept = 0.0
        for chunk, stage in enumerate(own):
            held = max(sum(at) for at in schedule.held[rank][chunk])
            kept += held * sum(n * layer_activations(job, policy) for policy, n in job.stages[stage])
            kept += held * boundary * job.program.keeps_outputs * (job.pp > 1)
        again = any(policy == "full" for stage in own for policy, _ in job.stages[stage])
        working = layer_activations(job, "none") * (2 if again else 1)  # with as much in gradients
        if len(job.stages) - 1 in own:
            working = max(working, 10.0 * job.tokens * job.vocab)  # logits in 16 bits and fp32, their gradient
        found.append(_states(job, by_role) + kept + working)
    return found


def _states(job: StepJob, by_role: Counter[Role]) -> float:
    """Weights in 16 bits, gradients, and the optimizer, with 4 bytes for the gradients if it reads them in fp32."""
    parameters = by_role.total()
    optimizer = ADAMW.nbytes(by_role, weight_bytes=2) + (4.0 * parameters if job.program.gradient_bytes == 2 else 0.0)
    optimizer /= job.dp if job.zero_stage else 1
    gradients = job.program.gradient_bytes * parameters / (job.dp if job.zero_stage >= 2 else 1)
    weights = 2.0 * parameters
    if job.zero_stage == 3:
        weights = weights / job.dp + 4.0 * parameters / max(1, job.model.num_hidden_layers)
    return weights + gradients + optimizer


def layer_activations(job: StepJob, policy: str) -> float:
    """Return the bytes that one layer of one micro-batch keeps."""
    numbers = float(job.tokens) * job.model.hidden_size
    if job.program.gated and policy != "full":
        # Two norms' inputs and results, q, k, v before and after rotation, attention's result; gate, up, SiLU, product.
        own = numbers / job.tp if job.sequence_parallel else numbers
        return 8 * own + 14 * numbers / job.tp + 8.0 * job.tokens * job.model.intermediate_size / job.tp
    if policy == "full":
        return 2 * numbers / (job.tp if job.program.gated and job.sequence_parallel else 1)
    whole, cut = (0.0, 34.0) if job.sequence_parallel else (10.0, 24.0)
    if not job.program.flash and policy != "selective":
        cut += 5.0 * job.model.num_attention_heads * job.seq_len / job.model.hidden_size
    return numbers * (whole + cut / job.tp)
