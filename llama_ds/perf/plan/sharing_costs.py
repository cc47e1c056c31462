"""Costs of context parallelism in a step: bytes and times of a rank's messages, imbalance of causal work."""

from __future__ import annotations

from dataclasses import dataclass

from llama_ds.config.context_parallel import CpSizes
from llama_ds.layout.planned_documents import ring_imbalance
from llama_ds.perf.plan.compute import flash_attention, plain_attention
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import StepJob
from llama_ds.perf.plan.row_sharing import SharedAttention, shared_attention
from llama_ds.perf.plan.step import StepTime


@dataclass(frozen=True)
class SharingCosts:
    """Costs of a step on the pipeline rank that sends most."""

    method: str
    ranks: int
    stride: int  # distance between neighbours of a group
    key_value_bytes: int  # keys and values of one rank's tokens of a micro-batch, in one layer
    sent_bytes: float  # by a rank in a step
    exposed_s: float  # time of messages that the rank waits for
    hidden_s: float  # time of messages behind the computation of blocks
    imbalance: float  # attention of the slowest rank over the mean, less 1, for the documents of the plan
    imbalance_in_chunks: float | None  # the same, were rows cut without regard to documents; None: they are

    def words(self) -> str:
        """Return the costs as text."""
        return (
            f"{self.method} over {self.ranks} ranks at distance {self.stride}: {self.key_value_bytes / 2**20:,.1f} MiB "
            f"of keys and values in a layer, {self.sent_bytes / 2**30:,.1f} GiB sent in a step; messages take "
            f"{self.exposed_s:.2f} s exposed and {self.hidden_s:.2f} s hidden; imbalance of causal work "
            f"{self.imbalance:.1%}"
            + ("" if self.imbalance_in_chunks is None else f" (cut in chunks: {self.imbalance_in_chunks:.1%})")
        )


def sharing_costs(gpu: Hardware, step: StepTime) -> SharingCosts | None:
    """Return the costs of a step's context parallelism; None without it."""
    job, sharing = step.job, step.job.sharing
    if sharing.size == 1:
        return None
    shared, placement = _attention(gpu, job), step.job.placement
    found = []
    for rank in range(job.pp):
        sent = total = exposed = 0.0
        for stage in (placement.stage(rank, chunk) for chunk in range(placement.chunks)):
            backwards = job.layers[stage]
            forwards = backwards + sum(n for policy, n in job.stages[stage] if policy == "full")
            sent += forwards * shared.sent[0] + backwards * shared.sent[1]
            total += forwards * shared.messages[0] + backwards * shared.messages[1]
            times = step.stages[stage]
            exposed += times.forward.context + times.recompute.context + times.input_backward.context
        found.append((sent, exposed, total - exposed))
    sent, exposed, hidden = (value * job.micro_batches for value in max(found))
    chunked = sharing.sizes._replace(striped=False)
    keys = 2 * job.tokens * -(-job.model.num_key_value_heads // job.tp) * job.model.head_dim
    return SharingCosts(
        sharing.sizes.words(),
        sharing.size,
        sharing.stride,
        keys * job.program.element_bytes,
        sent,
        exposed,
        max(0.0, hidden),
        _imbalance(job, sharing.sizes),
        _imbalance(job, chunked) if sharing.sizes.striped and job.seq_len % chunked.chunks == 0 else None,
    )


def _imbalance(job: StepJob, sizes: CpSizes) -> float:
    return ring_imbalance(job.documents, sizes, job.micro_batch)


def _attention(gpu: Hardware, job: StepJob) -> SharedAttention:
    model, program = job.model, job.program
    heads, kv_heads = (-(-count // job.tp) for count in (model.num_attention_heads, model.num_key_value_heads))
    attend = flash_attention if program.flash else plain_attention
    sizes = job.micro_batch, job.seq_len, heads, kv_heads, model.head_dim
    return shared_attention(gpu, job.sharing, attend, *sizes, program.element_bytes, job.attended)
