"""Causal attention with forward and backward as two plain calls, for the layer with the hand-written backward.

Shapes as in `llama_ds.model.attention`: q (B, T, H, K), k and v (B, T, G, K) with H = G R, out (B, T, H, K). The
statistics of a forward are the logsumexp of the scores (float32 or wider) and whatever else its backward needs.

With P = softmax(Q K^T / sqrt(K), causal), O = P V and dO: dV = P^T dO, dP = dO V^T,
dS = P * (dP - rowsum(dO * O)), dQ = dS K / sqrt(K), dK = dS^T Q / sqrt(K) (Dao 2022, appendix B.2).
"""

from __future__ import annotations

import importlib
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from llama_ds.model.attention import FLASH_4, Documents, flash_module, repeat_heads
from llama_ds.model.attention_blocks import blocked_backward, blocked_forward, blocks_pay
from llama_ds.model.attention_torch_flash import TorchFlash, torch_flash_takes
from llama_ds.model.cpu_products import rounds_natively

Statistics = tuple[Tensor, ...]
Gradients = tuple[Tensor, Tensor, Tensor]


class AttentionKernel(Protocol):
    """One backend: a forward without autograd, and its backward."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Statistics]:
        """Return (out, statistics)."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Statistics, docs: Documents | None
    ) -> Gradients:
        """Return (dL/dq, dL/dk, dL/dv) for grad = dL/dout."""


def attention_kernel(backend: str) -> AttentionKernel:
    """Return the kernel of a backend that `llama_ds.model.attention.choose_backend` has resolved."""
    if backend == "flash_attn":
        return _FlashAttention4() if flash_module().__name__ == FLASH_4 else _FlashAttention2()
    return _Reference() if backend == "reference" else _Sdpa()


def block_kernel(backend: str, like: Tensor, causal: bool) -> AttentionKernel | None:
    """Return the kernel for a block of queries and keys whose first statistic is the logsumexp (B, H, queries).

    None: the backend has no such kernel for the device and dtype of `like`, and `plain_blocks` computes the block.
    """
    if backend == "flash_attn":
        return _FlashAttention4(causal) if flash_module().__name__ == FLASH_4 else _FlashAttention2(causal)
    if backend == "reference":
        return None
    if like.is_cuda:
        return TorchFlash(causal) if torch_flash_takes(like) else None
    return _SdpaCpu(causal)


def packed_kernel(backend: str, like: Tensor) -> AttentionKernel | None:
    """Return the kernel for packed documents whose first statistic is the logsumexp (H, tokens of all of them).

    None: the backend has no such kernel for the device and dtype of `like`.
    """
    if backend == "flash_attn":
        return attention_kernel(backend)
    return TorchFlash() if backend == "sdpa" and torch_flash_takes(like) else None


class _Reference:
    """Attention computed from its definition, in the inputs' dtype; for tests."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Statistics]:
        scores = self._scores(q, k, documents)
        lse = scores.logsumexp(-1)  # (B, H, T)
        p = (scores - lse[..., None]).exp()
        return torch.einsum("bhij,bjhk->bihk", p, repeat_heads(v, q.shape[2])), (lse,)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Statistics, docs: Documents | None
    ) -> Gradients:
        p = (self._scores(q, k, docs) - statistics[0][..., None]).exp()
        heads, scale = q.shape[2], 1 / math.sqrt(q.shape[-1])
        grad_p = torch.einsum("bihk,bjhk->bhij", grad, repeat_heads(v, heads))
        grad_s = p * (grad_p - (grad * out).sum(-1).transpose(1, 2)[..., None]) * scale
        grad_q = torch.einsum("bhij,bjhk->bihk", grad_s, repeat_heads(k, heads))
        grad_k = torch.einsum("bhij,bihk->bjhk", grad_s, q)
        grad_v = torch.einsum("bhij,bihk->bjhk", p, grad)
        return grad_q, _sum_groups(grad_k, k.shape[2]), _sum_groups(grad_v, v.shape[2])

    @staticmethod
    def _scores(q: Tensor, k: Tensor, documents: Documents | None) -> Tensor:
        length = q.shape[1]
        scores = torch.einsum("bihk,bjhk->bhij", q, repeat_heads(k, q.shape[2])) / math.sqrt(q.shape[-1])
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~(causal if documents is None else documents.mask), -math.inf)


class _Sdpa:
    """torch's scaled_dot_product_attention through its functions for each device; blockwise for short rows on a CPU."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Statistics]:
        return self._kernel(q).forward(q, k, v, documents)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Statistics, docs: Documents | None
    ) -> Gradients:
        return self._kernel(q).backward(grad, q, k, v, out, statistics, docs)

    @staticmethod
    def _kernel(q: Tensor) -> AttentionKernel:
        if q.is_cuda:
            return TorchFlash() if torch_flash_takes(q) else _EfficientCuda()
        if not blocks_pay(q):
            return _SdpaCpu()
        return BlockedBackward() if q.dtype == torch.bfloat16 and rounds_natively() else BlockedAttention()


class BlockedAttention:
    """The blockwise attention of `attention_blocks`, on a CPU."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Statistics]:
        out, lse = blocked_forward(q, k, v, _bias(documents, q))
        return out, (lse,)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Statistics, docs: Documents | None
    ) -> Gradients:
        return blocked_backward(grad, q, k, v, out, statistics[0], _bias(docs, q))


class BlockedBackward(BlockedAttention):
    """torch's forward, which multiplies bfloat16 by AMX, with the blockwise backward: torch's multiplies in float32."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Statistics]:
        return _SdpaCpu().forward(q, k, v, documents)


class _Backend:
    """A kernel that also computes a block of attention in which every query sees every key."""

    def __init__(self, causal: bool = True) -> None:
        self.causal = causal


class _SdpaCpu(_Backend):
    """torch's flash attention for the CPU, which lacks grouped queries."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Statistics]:
        heads = q.shape[2]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_heads_first(x) for x in (q, repeat_heads(k, heads), repeat_heads(v, heads))),
            is_causal=documents is None and self.causal,
            attn_mask=_bias(documents, q),
        )
        return out.transpose(1, 2), (lse,)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Statistics, docs: Documents | None
    ) -> Gradients:
        heads, groups = q.shape[2], k.shape[2]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_heads_first(x) for x in (grad, q, repeat_heads(k, heads), repeat_heads(v, heads), out)),
            statistics[0],
            0.0,
            docs is None and self.causal,
            attn_mask=_bias(docs, q),
        )
        grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grads)
        return grad_q, _sum_groups(grad_k, groups), _sum_groups(grad_v, groups)


class _EfficientCuda(_Backend):
    """torch's memory-efficient kernel, for what its flash kernels do not take: float32, and other head sizes.

    Its logsumexp is padded, and document masks are a bias on all scores.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Statistics]:
        bias, heads = _bias(documents, q), q.shape[2]
        out, lse, seed, offset = torch.ops.aten._scaled_dot_product_efficient_attention(
            *(_heads_first(x) for x in (q, repeat_heads(k, heads), repeat_heads(v, heads))),
            bias,
            True,
            0.0,
            bias is None and self.causal,
        )
        return out.transpose(1, 2), (lse, seed, offset)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Statistics, docs: Documents | None
    ) -> Gradients:
        heads, groups, bias = q.shape[2], k.shape[2], _bias(docs, q)
        lse, *state = statistics
        *grads, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            *(_heads_first(x) for x in (grad, q, repeat_heads(k, heads), repeat_heads(v, heads))),
            bias,
            _heads_first(out),
            lse,
            *state,
            0.0,
            [True, True, True, False],
            bias is None and self.causal,
        )
        grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grads)
        return grad_q, _sum_groups(grad_k, groups), _sum_groups(grad_v, groups)


class _FlashAttention2(_Backend):
    """flash_attn 2.x through the functions below its autograd functions; packed documents are variable-length rows."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__(causal)
        self._functions: Any = importlib.import_module("flash_attn.flash_attn_interface")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Statistics]:
        if documents is None:
            out, lse, _, state = self._functions._wrapped_flash_attn_forward(
                q, k, v, **_options(q, self.causal), return_softmax=False
            )
            return out, (lse, state)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        lengths = _lengths(documents)
        out, lse, _, state = self._functions._wrapped_flash_attn_varlen_forward(
            *flat, *lengths, **_options(q, self.causal), return_softmax=False
        )
        return out.view_as(q), (lse, state)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Statistics, docs: Documents | None
    ) -> Gradients:
        lse, state = statistics
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        options = {**_options(q, self.causal), "deterministic": False, "rng_state": state}
        if docs is None:
            self._functions._wrapped_flash_attn_backward(grad, q, k, v, out, lse, *grads, **options)
        else:
            flat = (x.flatten(0, 1) for x in (grad, q, k, v, out))
            flat_grads = (x.flatten(0, 1) for x in grads)
            self._functions._wrapped_flash_attn_varlen_backward(*flat, lse, *flat_grads, *_lengths(docs), **options)
        return grads  # type: ignore[return-value]


class _FlashAttention4(_Backend):
    """flash_attn 4.x (`flash_attn.cute`) through the functions below its autograd functions."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__(causal)
        self._functions: Any = importlib.import_module("flash_attn.cute.interface")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Statistics]:
        if documents is None:
            out, lse, *_ = self._functions._flash_attn_fwd(q, k, v, causal=self.causal, return_lse=True)
            return out, (lse,)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out, lse, *_ = self._functions._flash_attn_fwd(
            *flat, **self._varlen(documents), causal=self.causal, return_lse=True
        )
        return out.view_as(q), (lse,)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Statistics, docs: Documents | None
    ) -> Gradients:
        (lse,) = statistics
        if docs is None:
            return self._functions._flash_attn_bwd(q, k, v, out, grad, lse, causal=self.causal)[:3]
        flat = (x.flatten(0, 1) for x in (q, k, v, out, grad))
        grads = self._functions._flash_attn_bwd(*flat, lse, causal=self.causal, **self._varlen(docs))[:3]
        return tuple(x.unflatten(0, q.shape[:2]) for x in grads)

    @staticmethod
    def _varlen(documents: Documents) -> dict[str, Any]:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return dict(zip(names, _lengths(documents), strict=True))


def _options(q: Tensor, causal: bool) -> dict[str, Any]:
    """Return flash_attn 2.x's options for plain attention."""
    return {
        "dropout_p": 0.0,
        "softmax_scale": q.shape[-1] ** -0.5,
        "causal": causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _lengths(documents: Documents) -> tuple[Tensor, Tensor, int, int]:
    offsets = documents.cumulative_lengths
    return offsets, offsets, documents.longest, documents.longest


def _bias(documents: Documents | None, q: Tensor) -> Tensor | None:
    """Return the additive (B, 1, T, T) mask of the documents."""
    if documents is None:
        return None
    mask = documents.bias(q.dtype)
    return mask.expand(-1, q.shape[2], -1, -1) if q.is_cuda else mask


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _sum_groups(grad: Tensor, groups: int) -> Tensor:
    """Sum over the query heads that share a key-value head: (B, T, H, K) -> (B, T, G, K)."""
    return grad if grad.shape[2] == groups else grad.unflatten(2, (groups, -1)).sum(3)
