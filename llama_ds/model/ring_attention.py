"""Causal attention over rows that context-parallel ranks share, by a ring (Liu et al., arXiv 2310.01889).

Each rank keeps its queries; keys and values travel from rank to rank, and so do their gradients in the backward. Every
message is issued before the block that is computed meanwhile. Shapes as in `llama_ds.model.attention_kernels`, with S
tokens of this rank in place of T; `layout/row_cuts.py` says which tokens, and which blocks the steps of the ring are.
With document masks a block is cut into those in which a query sees a key (`layout/document_blocks.py`).

The parts O_i of the blocks, with logsumexps l_i over their keys, merge to l = log sum exp(l_i) and
O = sum exp(l_i - l) O_i. With the merged l and O, P = exp(Q K^T / sqrt(K) - l) and rowsum(dO * O) of a block are those
of whole rows, so the gradients of a block follow from its own keys (Dao 2022, appendix B.2). Sums over blocks are in
float32 or wider.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llama_ds.layout.document_blocks import Piece, pieces_of
from llama_ds.layout.row_cuts import ring_block
from llama_ds.model.attention import Documents
from llama_ds.model.attention_kernels import AttentionKernel, Gradients, Statistics, block_kernel
from llama_ds.model.context_parallel import ContextParallel
from llama_ds.model.plain_blocks import block_backward, block_forward


class RingAttention:
    """The kernel `llama_ds.model.attention_kernels.AttentionKernel` over the ranks of a ring."""

    def __init__(self, cp: ContextParallel, backend: str) -> None:
        """`backend` computes blocks without masks of documents, where it has a kernel for blocks."""
        self.cp, self.backend = cp, backend
        self.rank, self.size = cp.rank // cp.sizes.all_to_all, cp.sizes.ring
        self._kernels: dict[tuple[torch.device, torch.dtype, bool], AttentionKernel | None] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Statistics]:
        """Return out (B, S, H, K) and the merged logsumexp (B, H, S), followed by state of the blocks' kernel."""
        out = _wide(torch.empty_like(q, memory_format=torch.contiguous_format))
        lse = out.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
        state: Statistics = ()
        keys_values = torch.stack([k, v])
        for step in range(self.size):
            passing = self.cp.start_pass(keys_values) if step + 1 < self.size else None
            for (rows, queries, keys, causal, _), work in self._work(step, q, documents):
                part, part_lse, own_state = work.forward(q[rows, queries], *keys_values[:, rows, keys])
                state = state or own_state
                if step == 0 and causal:  # the first block of these queries, which has a key for each
                    out[rows, queries], lse[rows, :, queries] = part.to(out.dtype), part_lse.to(lse.dtype)
                else:
                    _merge(out[rows, queries], lse[rows, :, queries], part, part_lse)
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
        grad_q = _wide(torch.zeros_like(q))
        arriving = None
        for step in range(self.size):
            passing = self.cp.start_pass(keys_values) if step + 1 < self.size else None
            parts: list[tuple[Piece, Tensor, Tensor]] = []
            for piece, work in self._work(step, q, docs):
                rows, queries, keys = piece[:3]
                own_grad, own_q, own_out = (x[rows, queries] for x in (grad, q, out))
                own_keys, own_values = keys_values[:, rows, keys]
                own_lse = lse[rows, :, queries]
                found = work.backward(own_grad, own_q, own_keys, own_values, own_out, own_lse, tuple(state))
                grad_q[rows, queries] += found[0]
                parts.append((piece, *found[1:]))
            travelling = arriving() if arriving else _wide(torch.zeros_like(keys_values))
            for piece, *grads in parts:
                for total, part in zip(travelling, grads, strict=True):
                    total[piece.rows, piece.keys] += part
            arriving = self.cp.start_pass(travelling)
            if passing:
                keys_values = passing()
        assert arriving is not None
        grad_k, grad_v = arriving()
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def _work(self, step: int, q: Tensor, documents: Documents | None) -> list[tuple[Piece, _BlockWork]]:
        """Return the blocks of a step, and how each is computed."""
        block, rows = ring_block(q.shape[1], self.rank, self.size, step), slice(0, q.shape[0])
        if documents is None:
            piece = Piece(rows, block.queries, block.keys, block.causal)
            return [(piece, self._computed(piece, q, None))]
        key = (self.rank, self.size, step)
        if key not in documents.blocks:
            documents.blocks[key] = pieces_of(block, self.rank, self.size, q.shape[1], documents.begins)
        return [(piece, self._computed(piece, q, documents)) for piece in documents.blocks[key]]

    def _computed(self, piece: Piece, q: Tensor, documents: Documents | None) -> _BlockWork:
        if documents is not None and piece.begins is not None:
            tokens = slice(piece.begins, piece.begins + piece.queries.stop - piece.queries.start)
            return _BlockWork(None, documents.start[piece.rows, tokens] - piece.begins)
        key = q.device, q.dtype, piece.causal
        if key not in self._kernels:
            self._kernels[key] = block_kernel(self.backend, q, piece.causal)
        kernel = self._kernels[key]
        if kernel is not None or not piece.causal:
            return _BlockWork(kernel, None)
        tokens = piece.queries
        return _BlockWork(None, torch.zeros(1, tokens.stop - tokens.start, dtype=torch.int32, device=q.device))


class _BlockWork(NamedTuple):
    """One block of attention: by a kernel, or by plain matrix products where there is none."""

    kernel: AttentionKernel | None
    first: Tensor | None  # for plain products: the first key (B or 1, queries) that each query sees; None: all keys

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Statistics]:
        if self.kernel is None:
            return *block_forward(q, k, v, self.first), ()
        out, (lse, *state) = self.kernel.forward(q, k, v, None)
        return out, lse, tuple(state)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: Statistics
    ) -> Gradients:
        if self.kernel is None:
            return block_backward(grad, q, k, v, out, lse, self.first)
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
