"""Causal attention over rows that context-parallel ranks share, by a ring (Liu et al., arXiv 2310.01889).

Each rank keeps its queries; keys and values travel from rank to rank, and so do their gradients in the backward. Every
message is issued before the block that is computed meanwhile. Shapes as in `llama_ds.model.attention_kernels`, with S
tokens of this rank in place of T; `layout/row_cuts.py` says which, and `ring_blocks.py` has the blocks of a step.

The parts O_i of the blocks, with logsumexps l_i over their keys, merge to l = log sum exp(l_i) and
O = sum exp(l_i - l) O_i. With the merged l and O, P = exp(Q K^T / sqrt(K) - l) and rowsum(dO * O) of a block are those
of whole rows, so the gradients of a block follow from its own keys (Dao 2022, appendix B.2). Sums over blocks are in
float32 or wider.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_ds.model.attention import Documents
from llama_ds.model.attention_kernels import Gradients, Statistics
from llama_ds.model.context_parallel import ContextParallel
from llama_ds.model.ring_blocks import KernelBlock, RingBlocks


class RingAttention:
    """The kernel `llama_ds.model.attention_kernels.AttentionKernel` over the ranks of a ring."""

    def __init__(self, cp: ContextParallel, backend: str) -> None:
        """`backend` computes blocks, where it has a kernel for them."""
        self.cp, self.size = cp, cp.sizes.ring
        self.blocks = RingBlocks(cp.rank // cp.sizes.all_to_all, self.size, cp.sizes.striped, backend)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Statistics]:
        """Return out (B, S, H, K) and the merged logsumexp (B, S, H), followed by state of the blocks' kernel."""
        out = _wide(torch.empty_like(q, memory_format=torch.contiguous_format))
        lse = out.new_full(q.shape[:3], -torch.inf)
        state: Statistics = ()
        keys_values = torch.stack([k, v])
        for step in range(self.size):
            passing = self.cp.start_pass(keys_values) if step + 1 < self.size else None
            for block in self.blocks.at(step, q, documents):
                own_keys, own_values = map(block.keys.take, keys_values)
                part, part_lse, own_state = block.forward(block.queries.take(q), own_keys, own_values)
                state = state or own_state
                _merge(out, lse, block, part, part_lse)
            if passing:
                keys_values = passing()
        return out.to(q.dtype), (lse, *state)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Statistics, docs: Documents | None
    ) -> Gradients:
        """Return (dL/dq, dL/dk, dL/dv) for this rank's tokens.

        The gradients of keys and values follow these one step behind, and reach their own rank with the last message.
        """
        lse, *state = statistics
        keys_values = torch.stack([k, v])
        grad_q = _wide(torch.zeros_like(q, memory_format=torch.contiguous_format))
        arriving = None
        for step in range(self.size):
            passing = self.cp.start_pass(keys_values) if step + 1 < self.size else None
            parts: list[tuple[KernelBlock, Tensor, Tensor]] = []
            for block in self.blocks.at(step, q, docs):
                own_grad, own_q, own_out, own_lse = map(block.queries.take, (grad, q, out, lse))
                own_keys, own_values = map(block.keys.take, keys_values)
                found = block.backward(own_grad, own_q, own_keys, own_values, own_out, own_lse, tuple(state))
                block.queries.add(grad_q, found[0])
                parts.append((block, *found[1:]))
            travelling = arriving() if arriving else _wide(torch.zeros_like(keys_values))
            for block, *grads in parts:
                for total, part in zip(travelling, grads, strict=True):
                    block.keys.add(total, part)
            arriving = self.cp.start_pass(travelling)
            if passing:
                keys_values = passing()
        assert arriving is not None
        grad_k, grad_v = arriving()
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _merge(out: Tensor, lse: Tensor, block: KernelBlock, part: Tensor, part_lse: Tensor) -> None:
    """Add a block's part (B, Q, H, K) with its logsumexp (B, Q, H) to `out` and `lse`, in place."""
    own_out, own_lse, part_lse = block.queries.take(out), block.queries.take(lse), part_lse.to(lse.dtype)
    if block.whole:
        own_out.copy_(part)
        own_lse.copy_(part_lse)
    else:
        merged = torch.logaddexp(own_lse, part_lse)
        kept, added = ((x - merged).exp().unsqueeze(-1) for x in (own_lse, part_lse))
        own_out.mul_(kept).addcmul_(part.to(out.dtype), added)
        own_lse.copy_(merged)
    block.queries.put(out, own_out)
    block.queries.put(lse, own_lse)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
