"""Causal attention over rows that context-parallel ranks share, by a ring (Liu et al., arXiv 2310.01889).

Each rank keeps its queries; keys and values travel from rank to rank, and so do their gradients in the backward. Every
message is issued before the block that is computed meanwhile. Shapes as in `llama_ds.model.attention_kernels`, with S
tokens of this rank in place of T; `layout/row_cuts.py` says which tokens, and which blocks the steps of the ring are.

The parts O_i of the blocks, with logsumexps l_i over their keys, merge to l = log sum exp(l_i) and
O = sum exp(l_i - l) O_i. With the merged l and O, P = exp(Q K^T / sqrt(K) - l) and rowsum(dO * O) of a block are those
of whole rows, so the gradients of a block follow from its own keys (Dao 2022, appendix B.2). Sums over blocks are in
float32 or wider.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llama_ds.layout.row_cuts import RingBlock, ring_block
from llama_ds.model.attention import Documents
from llama_ds.model.attention_kernels import AttentionKernel, Gradients, Statistics, block_kernel
from llama_ds.model.context_parallel import ContextParallel, positions
from llama_ds.model.plain_blocks import block_backward, block_forward


class RingAttention:
    """The kernel `llama_ds.model.attention_kernels.AttentionKernel` over the ranks of a ring."""

    def __init__(self, cp: ContextParallel, backend: str) -> None:
        """`backend` computes blocks without document masks, where it has a kernel for blocks."""
        self.cp, self.backend = cp, backend
        self._kernels: dict[tuple[torch.device, torch.dtype, bool], AttentionKernel | None] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Statistics]:
        """Return out (B, S, H, K) and the merged logsumexp (B, H, S), followed by state of the blocks' kernel."""
        cp = self.cp
        out, lse, state = q, q, tuple[Tensor, ...]()  # replaced in the first step
        keys_values = torch.stack([k, v])
        for step in range(cp.size):
            passing = cp.start_pass(keys_values) if step + 1 < cp.size else None
            block = ring_block(q.shape[1], cp.rank, cp.size, step)
            work = self._work(block, q, documents)
            if work.any_visible:
                keys, values = keys_values[:, :, block.keys]
                part, part_lse, own_state = work.forward(q[:, block.queries], keys, values)
                if step == 0:
                    out, lse, state = _wide(part), _wide(part_lse).contiguous(), own_state
                else:
                    _merge(out[:, block.queries], lse[:, :, block.queries], part, part_lse)
            if passing:
                keys_values = passing()
        return out.to(q.dtype), (lse, *state)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Statistics, docs: Documents | None
    ) -> Gradients:
        """Return (dL/dq, dL/dk, dL/dv) for this rank's tokens.

        The gradients of keys and values follow these one step behind, and reach their own rank with the last message.
        """
        cp = self.cp
        lse, *state = statistics
        keys_values = torch.stack([k, v])
        grad_q = _wide(torch.zeros_like(q))
        arriving = None
        for step in range(cp.size):
            passing = cp.start_pass(keys_values) if step + 1 < cp.size else None
            block = ring_block(q.shape[1], cp.rank, cp.size, step)
            queries, work = block.queries, self._work(block, q, docs)
            parts: Gradients | None = None
            if work.any_visible:
                (keys, values), own_lse = keys_values[:, :, block.keys], lse[:, :, queries]
                parts = work.backward(
                    grad[:, queries], q[:, queries], keys, values, out[:, queries], own_lse, tuple(state)
                )
            travelling = arriving() if arriving else _wide(torch.zeros_like(keys_values))
            if parts:
                grad_q[:, queries] += parts[0]
                for total, part in zip(travelling, parts[1:], strict=True):
                    total[:, block.keys] += part
            arriving = cp.start_pass(travelling)
            if passing:
                keys_values = passing()
        assert arriving is not None
        grad_k, grad_v = arriving()
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def _work(self, block: RingBlock, q: Tensor, documents: Documents | None) -> _BlockWork:
        """Choose how a block is computed."""
        if documents is not None:
            visible = self._visible(block, documents)
            # A query always sees its own key. Asking a CUDA device for others would make the host wait for it.
            return _BlockWork(None, visible, block.causal or visible.is_cuda or bool(visible.any()))
        key = q.device, q.dtype, block.causal
        if key not in self._kernels:
            self._kernels[key] = block_kernel(self.backend, q, block.causal)
        kernel = self._kernels[key]
        if kernel is not None or not block.causal:
            return _BlockWork(kernel, None, True)
        earlier = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
        return _BlockWork(None, earlier[None], True)

    def _visible(self, block: RingBlock, documents: Documents) -> Tensor:
        """Return which keys of a block each query sees (B, queries, keys): the earlier ones of its document."""
        cp, start = self.cp, documents.start
        own, other = (positions(start.shape[1], cp, rank).to(start.device) for rank in (cp.rank, block.source))
        queries, keys = own[block.queries], other[block.keys]
        return (keys >= start[:, queries, None]) & (keys <= queries[:, None])


class _BlockWork(NamedTuple):
    """One block of attention: by a kernel, or by plain matrix products where there is none."""

    kernel: AttentionKernel | None
    visible: Tensor | None  # for plain products: (B or 1, queries, keys); None: all
    any_visible: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Statistics]:
        if self.kernel is None:
            return *block_forward(q, k, v, self.visible), ()
        out, (lse, *state) = self.kernel.forward(q, k, v, None)
        return out, lse, tuple(state)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: Statistics
    ) -> Gradients:
        if self.kernel is None:
            return block_backward(grad, q, k, v, out, lse, self.visible)
        return self.kernel.backward(grad, q, k, v, out, (lse.contiguous(), *state), None)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a block's part (B, Q, H, K) with its logsumexp (B, H, Q) to `out` and `lse`, in place."""
    part_lse = part_lse.to(lse.dtype)
    merged = torch.logaddexp(lse, part_lse)
    kept, added = ((x - merged).exp().transpose(1, 2)[..., None] for x in (lse, part_lse))
    out.mul_(kept).addcmul_(part.to(out.dtype), added)
    lse.copy_(merged)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
