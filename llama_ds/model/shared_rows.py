"""Attention for the context-parallel group of a rank, for both implementations of the decoder layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from llama_ds.model.all_to_all_attention import AllToAllAttention
from llama_ds.model.attention import CausalAttention, Documents
from llama_ds.model.attention_kernels import AttentionKernel, attention_kernel
from llama_ds.model.context_parallel import ContextParallel
from llama_ds.model.ring_attention import RingAttention


def kernel_over(cp: ContextParallel, backend: str) -> AttentionKernel:
    """Return the kernel of a resolved backend for rows that the ranks of `cp` share."""
    kernel = RingAttention(cp, backend) if cp.sizes.ring > 1 else attention_kernel(backend)
    return AllToAllAttention(cp, kernel) if cp.sizes.all_to_all > 1 else kernel


def attention_over(cp: ContextParallel, backend: str) -> CausalAttention:
    """Return differentiable attention of a resolved backend for rows that the ranks of `cp` share."""
    if cp.size == 1:
        return CausalAttention(backend)
    kernel = kernel_over(cp, backend)
    return CausalAttention(backend, lambda q, k, v, documents: _Attention.apply(q, k, v, kernel, documents))


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: AttentionKernel, documents: Documents | None
    ) -> Tensor:
        out, statistics = kernel.forward(q, k, v, documents)
        ctx.save_for_backward(q, k, v, out, *statistics)
        ctx.kernel, ctx.documents = kernel, documents
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out, *statistics = ctx.saved_tensors
        return *ctx.kernel.backward(grad, q, k, v, out, tuple(statistics), ctx.documents), None, None
