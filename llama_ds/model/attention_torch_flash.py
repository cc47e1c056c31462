"""torch's own flash attention on CUDA, dense and over packed documents, without the flash_attn package.

Shapes as in `llama_ds.model.attention_kernels`. Documents are sequences of variable length in one flat row of B * T
tokens: scores and weights between documents never exist, and no T x T mask does. The operators are those below
`torch.nn.functional.scaled_dot_product_attention` and `torch.nn.attention.varlen`; unlike the former they take
grouped queries, so keys and values are never repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llama_ds.config.rules import FLASH_HEAD_DIMS

if TYPE_CHECKING:
    from llama_ds.model.attention import Documents

FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_CAPABILITY = (8, 0)  # torch builds its flash kernels for Ampere and newer


def torch_flash_takes(like: Tensor) -> bool:
    """Return whether torch's flash kernels compute attention with queries like `like` (B, T, H, K)."""
    return (
        like.is_cuda
        and like.dtype in FLASH_DTYPES
        and like.shape[-1] in FLASH_HEAD_DIMS
        and (not torch.cuda.is_available() or torch.cuda.get_device_capability() >= _FLASH_CAPABILITY)
    )


class TorchFlash:
    """Flash attention as two plain calls; it also computes a block in which every query sees every key.

    The statistics are the logsumexp, (B, H, T) or over documents (H, B * T), and the two tensors of dropout's state.
    """

    def __init__(self, causal: bool = True) -> None:
        self.causal = causal

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return (out, statistics)."""
        inputs, lengths = _sequences((q, k, v), documents), _lengths(q, k, documents)
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            *inputs, *lengths, 0.0, documents is not None or self.causal, False
        )
        return out.view(q.shape), (lse, state, unused)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        statistics: tuple[Tensor, ...],
        docs: Documents | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dL/dq, dL/dk, dL/dv) for grad = dL/dout."""
        inputs, lengths = _sequences((grad, q, k, v, out), docs), _lengths(q, k, docs)
        lse, *state = statistics
        grads = torch.ops.aten._flash_attention_backward(
            *inputs, lse, *lengths, 0.0, docs is not None or self.causal, *state
        )
        grad_q, grad_k, grad_v = (x.view(like.shape) for x, like in zip(grads, (q, k, v), strict=True))
        return grad_q, grad_k, grad_v


def packed_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Return attention within documents (B, T, H, K), differentiable by autograd."""
    return _PackedAttention.apply(q, k, v, documents)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        out, statistics = TorchFlash().forward(q, k, v, documents)
        ctx.save_for_backward(q, k, v, out, *statistics)
        ctx.documents = documents
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, *statistics = ctx.saved_tensors
        return *TorchFlash().backward(grad, q, k, v, out, tuple(statistics), ctx.documents), None


def _sequences(tensors: tuple[Tensor, ...], documents: Documents | None) -> tuple[Tensor, ...]:
    return tensors if documents is None else tuple(x.flatten(0, 1) for x in tensors)


def _lengths(q: Tensor, k: Tensor, documents: Documents | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Return (offsets of queries, of keys, longest query sequence, longest key sequence)."""
    if documents is None:
        return None, None, q.shape[1], k.shape[1]
    return documents.cumulative_lengths, documents.cumulative_lengths, documents.longest, documents.longest
