"""What a rank holds besides the activations that its layers keep. Pure arithmetic; e bytes a number of the run's dtype.

With P parameters on the rank: weights e P, gradients 4 P (fp32 buffers), and this data-parallel rank's part of the
optimizer's states, of AdamW 8 P / dp, and in bf16 12 P / dp (ZeRO-1; Rajbhandari et al., arXiv 1910.02054, section 5).
Working memory: one layer's whole activations with as much again in gradients, or the head's chunk of logits and its
fp32 gradient, whichever is more, and the messages posted and under way.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from llama_ds.config.schema import RunConfig
from llama_ds.layout.activation_memory import LayerWork
from llama_ds.layout.layout import Layout
from llama_ds.layout.loss_chunks import chunk_tokens
from llama_ds.layout.optimizer_states import ADAMW
from llama_ds.layout.partition import stage_boundaries, stage_roles
from llama_ds.layout.pipeline_schedule import schedule_of


@dataclass(frozen=True)
class RankMemory:
    """Bytes."""

    weights: int
    gradients: int
    optimizer: int
    working: int

    @property
    def fixed(self) -> int:
        """All but the activations kept between forward and backward."""
        return self.weights + self.gradients + self.optimizer + self.working


def rank_memory(run: RunConfig, layout: Layout, element_bytes: int) -> list[RankMemory]:
    """Return what the ranks of each pipeline position hold."""
    schedule = schedule_of(run, layout)
    place, model = schedule.place, run.model
    parameters = stage_roles(model, stage_boundaries(run), layout.tp)
    work = layer_work(run, layout, element_bytes)
    tokens = layout.micro_batch * run.data.seq_len
    vocab = model.vocab_size // layout.tp
    chunk = chunk_tokens(tokens, model.hidden_size, vocab)
    head = (
        chunk * vocab * element_bytes + 4 * vocab * model.hidden_size + 2 * tokens * model.hidden_size * element_bytes
    )
    message = work.saved_bytes("full")
    found = []
    for rank in range(layout.pp):
        own = [place.stage(rank, c) for c in range(place.chunks)]
        by_role = sum((parameters[stage] for stage in own), Counter())
        held = by_role.total()
        at_end = place.stages - 1 in own
        working = max(2 * work.saved_bytes("none"), head if at_end else 0)
        # In each direction: receives posted, one send under way and one being handed over.
        messages = 2 * place.chunks * (3 + schedule.extra_warmup) * message if layout.pp > 1 else 0
        states = ADAMW.nbytes(by_role, element_bytes) // layout.dp
        found.append(RankMemory(element_bytes * held, 4 * held, states, working + messages))
    return found


def layer_work(run: RunConfig, layout: Layout, element_bytes: int) -> LayerWork:
    """Return the run's decoder layer as its cost table wants it."""
    parallel = run.parallel
    return LayerWork(
        run.model, run.data.seq_len, layout.micro_batch, layout.tp, parallel.sequence_parallel, element_bytes
    )
