"""Memory of a rank other than saved activations. An element of the run's dtype has e bytes.

With P parameters on the rank: weights e P, gradients 4 P (fp32 buffers), and this rank's ZeRO-1 shard of the optimizer
states. AdamW's take 8 P / (dp cp), or 12 P / (dp cp) in bf16 (Rajbhandari et al., arXiv 1910.02054, section 5);
`optimizer_states.py` has those of other optimizers and dtypes. Working memory is the largest of one layer's activations
and their gradients, the head's chunk of logits with its fp32 gradient, and the factors of a weight gradient that is
computed for several micro-batches at once. The buffers of pipeline messages come on top, and 2 bytes for each element
of the decoder layers' matrices where these stay in float8 through a step, once along each dimension, or of one layer's
where gradients are sent in bf16: 4 where neighbours add them first. Muon's whole matrices take the place of activations
and working memory, which its step follows.

CUDA graphs have temporaries of their own, which nothing else uses. Beside them, the eager layer checks a graph, with
two copies of a layer's gradients. Activations stay in place, also in Muon's step.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from llama_ds.config.schema import RunConfig
from llama_ds.layout.activation_memory import LayerWork
from llama_ds.layout.layout import Layout
from llama_ds.layout.loss_chunks import chunk_tokens
from llama_ds.layout.matrix_memory import SUB_GROUP, MatrixStep, muon_bytes
from llama_ds.layout.optimizer_states import states_of
from llama_ds.layout.partition import decoder_layers, stage_boundaries, stage_roles
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.layout.vocab_parts import part_rows
from llama_ds.layout.weights import Role


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, without saved activations."""

    weights: int
    gradients: int
    optimizer: int
    working: int
    matrices: int  # held in the step of Muon instead of activations and working memory
    graphed: bool = False  # whether activations are held all the time

    @property
    def fixed(self) -> int:
        """The sum: all memory except saved activations."""
        return self.weights + self.gradients + self.optimizer + self.working

    def peak(self, activations: int) -> int:
        """Return the most that the rank holds at a time, with its saved `activations`."""
        return self.fixed - self.working + max(self.working + activations, self.in_muon(activations))

    def in_muon(self, activations: int) -> int:
        """Return what the rank holds in Muon's step beside weights, gradients and states; 0 without Muon."""
        return self.matrices + (activations if self.graphed and self.matrices else 0)


def rank_memory(run: RunConfig, layout: Layout, element_bytes: int) -> list[RankMemory]:
    """Return the memory of a rank at each pipeline position."""
    schedule = schedule_of(run, layout)
    placement, model = schedule.placement, run.model
    parameters = stage_roles(model, stage_boundaries(run), layout.tp)
    work = layer_work(run, layout, element_bytes)
    tokens = layout.micro_batch * run.data.seq_len // layout.cp
    vocab = part_rows(model.vocab_size, layout.tp)
    chunk = chunk_tokens(tokens, model.hidden_size, vocab)
    head = (
        chunk * vocab * element_bytes + 4 * vocab * model.hidden_size + 2 * tokens * model.hidden_size * element_bytes
    )
    message = work.saved_bytes("full")
    layers, found = decoder_layers(stage_boundaries(run)), []
    for rank in range(layout.pp):
        own = [placement.stage(rank, c) for c in range(placement.chunks)]
        by_role = sum((parameters[stage] for stage in own), Counter())
        held = by_role.total()
        has_head = placement.stages - 1 in own
        layer = max(2 * work.saved_bytes("none"), work.joint_factor_bytes(schedule.joint))
        own_layers = max(1, sum(layers[stage] for stage in own))
        working = max(layer, head if has_head else 0)
        if run.parallel.cuda_graphs:
            working = layer + max(layer + 8 * by_role[Role.HIDDEN_MATRIX] // own_layers, head if has_head else 0)
        # Buffers in each direction: posted receives, one send in flight and one being queued.
        messages = 2 * placement.chunks * (schedule.receives + 2) * message if layout.pp > 1 else 0
        copies = 2 * by_role[Role.HIDDEN_MATRIX] if keeps_fp8_weights(run, layout) else 0
        if run.adds_bf16_in_fp32:  # a layer on its way to the place of its gradients, or to neighbours in fp32
            sent = 4 if run.parallel.gradient_neighbours > 1 else 2
            copies += sent * by_role[Role.HIDDEN_MATRIX] // own_layers
        states = states_of(run.optimizer).nbytes(by_role, element_bytes)
        if run.parallel.post_validation:  # copies of the states, and of masters that are the weights themselves
            states += states + (element_bytes * held if element_bytes == 4 else 0)
        states //= layout.data_axis
        matrices = _matrices(run, layout, sum(layers[stage] for stage in own), element_bytes)
        working, graphed = working + messages + copies, run.parallel.cuda_graphs
        found.append(RankMemory(element_bytes * held, 4 * held, states, working, matrices, graphed))
    return found


def _matrices(run: RunConfig, layout: Layout, layers: int, element_bytes: int) -> int:
    """Return the bytes of the exchange of whole matrices on the fullest rank of a position with these layers."""
    if run.optimizer.name != "muon":
        return 0
    ours = run.parallel.own_pipeline
    group = run.deepspeed.get("zero_optimization", {}).get("sub_group_size", SUB_GROUP)
    step = MatrixStep(
        run.model, layout.data_axis, layout.tp, layers, element_bytes, run.zero_stage, by_layer=ours, sub_group=group
    )
    return muon_bytes(step)


def keeps_fp8_weights(run: RunConfig, layout: Layout) -> bool:
    """Return whether weights in float8 serve several micro-batches. ZeRO-3 gathers weights anew for each."""
    return run.compute.fp8 != "off" and layout.accumulation > 1 and run.zero_stage < 3


def layer_work(run: RunConfig, layout: Layout, element_bytes: int) -> LayerWork:
    """Return the run's decoder layer for the cost table in `activation_memory`."""
    parallel = run.parallel
    return LayerWork(
        run.model, run.data.seq_len, layout.micro_batch, layout.tp, parallel.sequence_parallel, element_bytes, layout.cp
    )
