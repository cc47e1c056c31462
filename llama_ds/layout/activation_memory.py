"""Activation memory and recompute cost of a decoder layer under each save policy.

Saved between forward and backward, per layer and micro-batch, in elements of the run's dtype. N = micro_batch * T / cp
tokens, M = N / tp under sequence parallelism, else N; D hidden size, F intermediate size, H query heads and G
key-value heads of size K:

    none       2 M D + N ((H + 2 G) K + H K + 3 F) / tp + 2 N D
    selective    M D + N ((H + 2 G) K + H K + 2 F) / tp, + M D where tp > 1, + 2 N D under sequence parallelism
    full         M D

All policies but full also save the attention's logsumexp: N H / tp elements of 4 bytes. A schedule that defers the
weight gradients keeps both factors of their products from the input backward to the weight backward:

    deferred    4 N D + N ((H + 2 G) K + H K + 3 F) / tp

The graphs of a layer (`model/graphed_layers.py`) hold in each slot what the policy saves and M D, the gradient of the
input; where weight gradients are deferred also those factors that are not saved: 2 N F + N (H + 2 G) K + N D of
gradients, with selective and full 2 N D + N F of inputs, with full N H K. A chunk adds M D, its output, and M D, the
gradient of it. Where some backwards are split and others are not, both gradients count twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_ds.config.schema import ModelConfig
from llama_ds.layout.flops import layer_forward_flops
from llama_ds.layout.joint_products import multiplied_jointly

LOGSUMEXP_BYTES = 4


@dataclass(frozen=True)
class LayerWork:
    """One decoder layer's share of one micro-batch on one rank."""

    model: ModelConfig
    seq_len: int
    micro_batch: int
    tp: int = 1
    sequence_parallel: bool = False
    element_bytes: int = 2
    cp: int = 1

    def saved_bytes(self, policy: str) -> int:
        """Return the bytes that the layer saves between its forward and backward, by the formulas above."""
        model = self.model
        tokens = self.micro_batch * self.seq_len // self.cp
        own = tokens // self.tp if self.sequence_parallel else tokens
        hidden, inner = model.hidden_size, model.intermediate_size
        queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        if policy == "full":
            return own * hidden * self.element_bytes
        keep = policy == "none"
        numbers = own * hidden * (2 if keep or self.tp > 1 else 1)
        numbers += tokens * (2 * queries + 2 * keys + (3 if keep else 2) * inner) // self.tp
        numbers += 2 * tokens * hidden if keep or self.sequence_parallel else 0
        return numbers * self.element_bytes + tokens * model.num_attention_heads // self.tp * LOGSUMEXP_BYTES

    def deferred_wgrad_bytes(self) -> int:
        """Return the bytes kept between the input backward and a deferred weight backward."""
        model = self.model
        tokens = self.micro_batch * self.seq_len // self.cp
        queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        own = tokens * (2 * queries + 2 * keys + 3 * model.intermediate_size) // self.tp
        return (4 * tokens * model.hidden_size + own) * self.element_bytes

    def slot_bytes(self, policy: str, deferred: bool, backwards: int = 1) -> int:
        """Return the bytes that a layer's graphs hold for a micro-batch in flight, by the formulas above.

        `backwards` is the number of kinds of backwards, of which one may defer weight gradients.
        """
        model, tokens = self.model, self.micro_batch * self.seq_len // self.cp
        hidden, inner = model.hidden_size, model.intermediate_size
        queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        numbers = backwards * hidden
        if deferred:
            numbers += 2 * inner + queries + 2 * keys + hidden
            numbers += 0 if policy == "none" else 2 * hidden + inner
            numbers += queries if policy == "full" else 0
        return self.saved_bytes(policy) + tokens * numbers * self.element_bytes

    def joint_factor_bytes(self, micro_batches: int) -> int:
        """Return the bytes of the largest factors of a weight gradient that is computed for `micro_batches` at once."""
        model = self.model
        tokens = self.micro_batch * self.seq_len // self.cp
        queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        hidden, inner = model.hidden_size, model.intermediate_size // self.tp
        matrices = [((queries + 2 * keys) // self.tp, hidden), (hidden, queries // self.tp), (2 * inner, hidden)]
        return max(
            micro_batches * tokens * (outputs + inputs) * self.element_bytes
            if multiplied_jointly(tokens, outputs, inputs, micro_batches, self.element_bytes)
            else 0
            for outputs, inputs in (*matrices, (hidden, inner))
        )

    def recomputed_flops(self, policy: str) -> float:
        """Return the FLOPs per token, over all tensor-parallel ranks, that the backward recomputes.

        selective recomputes the output projection where tp is 1. full recomputes the forward without its last
        product, because the backward does not read its result.
        """
        model = self.model
        queries = model.num_attention_heads * model.head_dim
        if policy == "selective" and self.tp == 1:
            return 2.0 * queries * model.hidden_size
        if policy == "full":
            return layer_forward_flops(model, self.seq_len) - 2.0 * model.hidden_size * model.intermediate_size
        return 0.0
