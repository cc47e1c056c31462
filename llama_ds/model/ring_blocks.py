"""The blocks of attention of a ring's step: which tokens meet, and the kernel that computes them.

Shapes: B rows, S tokens of this rank, H query and G key-value heads of size K, Q queries of a block. With document
masks, a step's parts of all documents are one call of a kernel for packed documents, N tokens in one row. Without such
a kernel they are blocks one by one (`layout/document_blocks.py`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from llama_ds.errors import UserError
from llama_ds.layout.document_blocks import Piece, RingStep, pieces_of
from llama_ds.layout.row_cuts import ring_block
from llama_ds.model.attention import Documents
from llama_ds.model.attention_kernels import AttentionKernel, Gradients, Statistics, block_kernel, packed_kernel
from llama_ds.model.plain_blocks import block_backward, block_forward


class Chosen(Protocol):
    """Some tokens of every tensor (B, S, ...) of a rank."""

    def take(self, x: Tensor) -> Tensor:
        """Return the tokens of x."""

    def put(self, x: Tensor, taken: Tensor) -> None:
        """Write tokens that were taken from x, and changed in place, back to it."""

    def add(self, x: Tensor, part: Tensor) -> None:
        """Add to the tokens of x."""


class TokenSpan(NamedTuple):
    """Consecutive tokens of consecutive rows; what is taken is a view."""

    rows: slice
    tokens: slice

    def take(self, x: Tensor) -> Tensor:
        return x[self.rows, self.tokens]

    def put(self, x: Tensor, taken: Tensor) -> None:
        return

    def add(self, x: Tensor, part: Tensor) -> None:
        x[self.rows, self.tokens] += part


class Listed(NamedTuple):
    """Tokens of the flattened rows, as one row: all as a view, or a copy of those with the given numbers (N,)."""

    tokens: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        return (flat if self.tokens is None else flat.index_select(0, self.tokens)).unsqueeze(0)

    def put(self, x: Tensor, taken: Tensor) -> None:
        if self.tokens is not None:
            _flat(x).index_copy_(0, self.tokens, taken.squeeze(0))

    def add(self, x: Tensor, part: Tensor) -> None:
        if self.tokens is None:
            _flat(x).add_(part.squeeze(0))
        else:
            _flat(x).index_add_(0, self.tokens, part.squeeze(0).to(x.dtype))


def _flat(x: Tensor) -> Tensor:
    return x.view(-1, *x.shape[2:])


class KernelBlock(NamedTuple):
    """Queries that meet keys, by a kernel, or by plain matrix products where there is none."""

    queries: Chosen
    keys: Chosen
    kernel: AttentionKernel | None
    documents: Documents | None = None  # set for a kernel for packed documents
    first: Tensor | None = None  # for plain products: the first key (B or 1, Q) that each query sees; None: all keys
    whole: bool = False  # whether it is the first block of its queries, and has a key for each

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Statistics]:
        """Return out (B, Q, H, K), logsumexp (B, Q, H) and state of the kernel, for q, k and v of the block."""
        if self.kernel is None:
            out, lse = block_forward(q, k, v, self.first)
            return out, lse.transpose(1, 2), ()
        out, (lse, *state) = self.kernel.forward(q, k, v, self.documents)
        if self.documents is not None:
            if lse.shape != (q.shape[2], q.shape[1]):
                raise UserError(
                    f"compute.attention_backend: the kernel for packed documents returns logsumexps {tuple(lse.shape)}"
                    ", which a ring cannot merge; install flash-attn 2.6 or newer, or use sdpa"
                )
            lse = lse.unsqueeze(0)
        return out, lse.transpose(1, 2), tuple(state)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: Statistics
    ) -> Gradients:
        """Return the block's part of (dL/dq, dL/dk, dL/dv)."""
        lse = lse.transpose(1, 2)
        if self.kernel is None:
            return block_backward(grad, q, k, v, out, lse, self.first)
        lse = (lse if self.documents is None else lse.squeeze(0)).contiguous()  # packed documents have (H, N)
        return self.kernel.backward(grad, q, k, v, out, (lse, *state), self.documents)


class RingBlocks:
    """Makes the blocks of a ring's steps for one backend."""

    def __init__(self, rank: int, size: int, striped: bool, backend: str) -> None:
        self.rank, self.size, self.striped, self.backend = rank, size, striped, backend
        self._kernels: dict[tuple[torch.device, torch.dtype, str], AttentionKernel | None] = {}

    def at(self, number: int, q: Tensor, documents: Documents | None) -> list[KernelBlock]:
        """Return the blocks of step `number` for queries like q (B, S, H, K)."""
        if self.striped:
            return self._of_stripes(number, q, documents)
        if documents is not None:
            raise ValueError("a ring shares rows with document masks in stripes")
        found = ring_block(q.shape[1], self.rank, self.size, number)
        rows = slice(0, q.shape[0])
        return [self._dense(Piece(rows, found.queries, found.keys, found.causal), q, number)]

    def _of_stripes(self, number: int, q: Tensor, documents: Documents | None) -> list[KernelBlock]:
        rows, length = q.shape[:2]
        step = RingStep(self.rank, (self.rank - number) % self.size, self.size, length)
        if documents is None:  # one document in each row
            return [self._dense(piece, q, number) for piece in pieces_of(step, [[0]] * rows)]
        key = (*step, q.device, q.dtype)
        if key not in documents.blocks:
            kernel = self._kernel("packed", q)
            documents.blocks[key] = (
                packed(step, documents, kernel)
                if kernel
                else [self._of_piece(piece, step, q, documents, number) for piece in pieces_of(step, documents.begins)]
            )
        return documents.blocks[key]

    def _of_piece(self, piece: Piece, step: RingStep, q: Tensor, documents: Documents, number: int) -> KernelBlock:
        if not piece.masked:
            return self._dense(piece, q, number)
        positions = slice(step.rank + piece.queries.start * step.size, piece.queries.stop * step.size, step.size)
        begins = documents.start[piece.rows, positions]
        first = (begins + step.size - 1 - step.source) // step.size - piece.keys.start
        return KernelBlock(
            TokenSpan(*piece[:2]), TokenSpan(piece.rows, piece.keys), None, first=first, whole=number == 0
        )

    def _dense(self, piece: Piece, q: Tensor, number: int) -> KernelBlock:
        kernel = self._kernel("causal" if piece.causal else "all", q)
        first, tokens = None, piece.queries
        if kernel is None and piece.causal:
            first = torch.zeros(1, tokens.stop - tokens.start, dtype=torch.int32, device=q.device)
        whole = number == 0 and piece.causal
        return KernelBlock(TokenSpan(*piece[:2]), TokenSpan(piece.rows, piece.keys), kernel, first=first, whole=whole)

    def _kernel(self, kind: str, q: Tensor) -> AttentionKernel | None:
        key = q.device, q.dtype, kind
        if key not in self._kernels:
            dense = kind != "packed"
            self._kernels[key] = (
                block_kernel(self.backend, q, kind == "causal") if dense else packed_kernel(self.backend, q)
            )
        return self._kernels[key]


def packed(step: RingStep, documents: Documents, kernel: AttentionKernel) -> list[KernelBlock]:
    """Return a step's squares of all documents as one call of a kernel for packed documents; [] if there are none."""
    squares = np.array(
        [
            (row * step.length + square.start, len(square))
            for row, begins in enumerate(documents.begins)
            for square in step.squares(begins)
        ],
        dtype=np.int64,
    ).reshape(-1, 2)
    if not len(squares):
        return []
    starts, lengths = squares[:, 0], squares[:, 1]
    device = documents.start.device
    own = Documents.of_lengths(lengths, device)
    if step.source == step.rank:  # all tokens
        return [KernelBlock(Listed(None), Listed(None), kernel, own, whole=True)]
    keys = np.arange(lengths.sum()) + np.repeat(starts - lengths.cumsum() + lengths, lengths)
    tokens = torch.tensor(keys, device=device)
    return [KernelBlock(Listed(tokens + step.shift), Listed(tokens), kernel, own)]
