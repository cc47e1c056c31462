"""Causal attention over rows that context-parallel ranks share, by all-to-alls (Jacobs et al., arXiv 2309.14509).

An all-to-all exchanges tokens for heads: each rank then computes attention over whole rows with its n-th of the heads,
and a second one exchanges back. Shapes as in `llama_ds.model.attention_kernels`; n ranks, S = T / n tokens of a rank.
In a ring of groups, T are the tokens of a group, and the kernel of a rank's heads is that of the ring.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama_ds.model.attention import Documents, repeat_heads
from llama_ds.model.attention_kernels import AttentionKernel, Gradients, Statistics
from llama_ds.model.context_parallel import ContextParallel


class AllToAllAttention:
    """The kernel `llama_ds.model.attention_kernels.AttentionKernel` over ranks that exchange tokens for heads."""

    def __init__(self, cp: ContextParallel, kernel: AttentionKernel) -> None:
        """`kernel` computes attention with the tokens of a whole group."""
        self.cp, self.kernel, self.ranks = cp, kernel, cp.sizes.all_to_all

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Statistics]:
        """Return out (B, S, H, K) and the statistics of this rank's heads over whole rows."""
        q, k, v = self._to_heads(q, self._repeated(k), self._repeated(v))
        out, statistics = self.kernel.forward(q, k, v, documents)
        return self._to_tokens(out)[0], statistics

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Statistics, docs: Documents | None
    ) -> Gradients:
        """Return (dL/dq, dL/dk, dL/dv) for this rank's tokens."""
        groups = k.shape[2]
        grad, q, k, v, out = self._to_heads(grad, q, self._repeated(k), self._repeated(v), out)
        grads = self.kernel.backward(grad, q, k, v, out, statistics, docs)
        grad_q, grad_k, grad_v = self._to_tokens(*grads)
        return grad_q, _sum_copies(grad_k, groups), _sum_copies(grad_v, groups)

    def _repeated(self, x: Tensor) -> Tensor:
        """Repeat key-value heads until n ranks have equally many: (B, S, G, K) -> (B, S, lcm(G, n), K)."""
        return repeat_heads(x, math.lcm(x.shape[2], self.ranks))

    def _to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Exchange tokens for heads, with one all-to-all: each (B, S, heads, K) -> (B, T, heads / n, K)."""
        n = self.ranks
        parts = [x.unflatten(2, (n, -1)).movedim(2, 0) for x in tensors]  # (n, B, S, heads / n, K)
        received = self.cp.all_to_all(torch.cat(parts, 3)).transpose(0, 1).flatten(1, 2)
        return received.split([part.shape[3] for part in parts], 2)

    def _to_tokens(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Exchange heads for tokens, with one all-to-all: each (B, T, heads / n, K) -> (B, S, heads, K)."""
        n = self.ranks
        parts = [x.unflatten(1, (n, -1)).movedim(1, 0) for x in tensors]  # (n, B, S, heads / n, K)
        received = self.cp.all_to_all(torch.cat(parts, 3)).split([part.shape[3] for part in parts], 3)
        return tuple(x.movedim(0, 2).flatten(2, 3) for x in received)


def _sum_copies(grad: Tensor, groups: int) -> Tensor:
    return grad if grad.shape[2] == groups else grad.unflatten(2, (groups, -1)).sum(3)
