"""Blockwise causal attention on a CPU as batched matrix products, for rows so short that it beats torch's kernel.

Shapes as in `llama_ds.model.attention_kernels`. Internally the R = H / G query heads of a key-value head are rows of
one matrix, (B G, T R, K), so no key is repeated. Blocks above the diagonal are skipped, and a block of scores is freed
before the next one is computed, so the full attention matrix never exists. Arithmetic is in float32 or wider; products
of bfloat16 inputs may round their factors to bfloat16 (`cpu_products.rounded_products`).

Scores are in units of log2(e), so that softmax takes exp2: torch's exp takes 7 x as long for -inf as for other numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama_ds.model.cpu_products import onednn_multiplies, rounded_products

LOG2_E = 1 / math.log(2)
MAX_ROW_TOKENS = 512  # longer rows take as long as in torch's kernel, or longer
MIN_HEAD_DIM = 128  # with MKL's products in float32


def blocks_pay(q: Tensor) -> bool:
    """Return whether forward and backward of queries q on a CPU take less time than in torch's kernel.

    Short rows take 0.4 to 0.8 of its time with oneDNN's products on AMD processors, in float32 and bfloat16. With MKL's
    in float32 heads of 128 take 0.7 to 0.9, smaller ones 0.9 to 1.5. In bfloat16 a backward takes 0.5 to 0.75 on Intel
    processors with AMX, forward and backward 0.3 to 0.8 on those without.
    """
    narrow = q.element_size() < 4
    return q.shape[1] <= MAX_ROW_TOKENS and (narrow or onednn_multiplies() or q.shape[-1] >= MIN_HEAD_DIM)


def blocked_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return out (B, T, H, K) and the scores' logsumexp (B, H, T); `bias` (B, 1, T, T), 0 or -inf, is added to them.

    Each block of queries multiplies the keys up to its end. `bias` also masks later keys; None masks only those.
    """
    blocks = _blocks(q.shape[1])
    groups, repeats = k.shape[2], q.shape[2] // k.shape[2]
    queries, keys, values = (_by_group(x, groups) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(*queries.shape[:2], 1, dtype=queries.dtype)
    with rounded_products(q.dtype):
        for start, end in blocks:
            rows = slice(start * repeats, end * repeats)
            scores = queries.new_empty(len(queries), (end - start) * repeats, end)
            _products(queries[:, rows], keys[:, :end].contiguous(), scores)
            _mask(scores, repeats, start, 0, bias)
            top = scores.amax(-1, keepdim=True)
            total = scores.sub_(top).exp2_().sum(-1, keepdim=True)
            torch.add(top, total.log2(), out=lse[:, rows])
            part = _grouped(out, groups)[:, :, start:end]
            part.copy_(torch.bmm(scores, values[:, :end]).div_(total).view(part.shape))
    by_head = lse.view(len(q), groups, q.shape[1], repeats).transpose(2, 3).flatten(1, 2)
    return out, by_head.div_(LOG2_E)


def blocked_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dL/dq, dL/dk, dL/dv) for grad = dL/dout and the forward's logsumexp (B, H, T).

    It takes one block of keys at a time, with all queries from its start. The gradients of a block's keys are final at
    once; only those of the queries are accumulated.
    """
    length, groups, repeats = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    blocks = _blocks(length)
    queries, keys, values, grads = (_by_group(x, groups) for x in (q, k, v, grad))
    lse = (lse.unflatten(1, (groups, repeats)).transpose(2, 3) * LOG2_E).reshape(*queries.shape[:2], 1)
    inner = (grads * _by_group(out, groups)).sum(-1, keepdim=True)  # rowsum(dO * O)
    grad_q, grad_k, grad_v = torch.zeros_like(queries), torch.empty_like(keys), torch.empty_like(values)
    # Reused by all blocks: in cold memory a product takes 1.6 x the time.
    memory = queries.new_empty(2, queries.shape[0] * queries.shape[1] * blocks[0][1])
    with rounded_products(q.dtype):
        for start, end in blocks:
            rows, block = slice(start * repeats, None), slice(start, end)
            own_q, own_grads, own_k, own_v = (
                x.contiguous() for x in (queries[:, rows], grads[:, rows], keys[:, block], values[:, block])
            )
            shape = 2, *own_q.shape[:2], end - start
            p, grad_s = memory[:, : math.prod(shape) // 2].view(shape)
            _products(own_q, own_k, p)
            _mask(p, repeats, start, start, bias)
            p.sub_(lse[:, rows]).exp2_()
            torch.bmm(p.transpose(1, 2), own_grads, out=grad_v[:, block])
            torch.bmm(own_grads, own_v.transpose(1, 2), out=grad_s).sub_(inner[:, rows]).mul_(p)
            torch.bmm(grad_s.transpose(1, 2), own_q, out=grad_k[:, block])
            grad_q[:, rows].baddbmm_(grad_s, own_k)
    scale = 1 / math.sqrt(q.shape[-1])
    scaled_grad_q = torch.empty(q.shape, dtype=q.dtype)
    torch.mul(grad_q.view(_grouped(q, groups).shape), scale, out=_grouped(scaled_grad_q, groups))
    grad_k, grad_v = (
        x.view(len(q), groups, length, -1).transpose(1, 2).to(q.dtype) for x in (grad_k.mul_(scale), grad_v)
    )
    return scaled_grad_q, grad_k, grad_v


def _blocks(length: int) -> list[tuple[int, int]]:
    """Return the first token of each block of queries or keys, and the one behind it.

    Outside of `rounded_products`, inside which oneDNN multiplies also where it was not selected.
    """
    size = 64 if onednn_multiplies() else 128
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _products(queries: Tensor, keys: Tensor, out: Tensor) -> None:
    """Write the scores of queries (n, r, K) and keys (n, m, K) to `out` (n, r, m), in units of log2(e).

    The factor is the product's, not the queries': bfloat16 numbers times a factor would be rounded.
    """
    out.baddbmm_(queries, keys.transpose(1, 2), beta=0, alpha=LOG2_E / math.sqrt(queries.shape[-1]))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Return a view (B, G, T, R, K) of (B, T, G R, K)."""
    return x.unflatten(2, (groups, -1)).permute(0, 2, 1, 3, 4)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Return a copy in float32 or wider: (B, T, G R, K) -> (B G, T R, K)."""
    view = _grouped(x, groups)
    copy = torch.empty(view.shape, dtype=torch.promote_types(x.dtype, torch.float32)).copy_(view)
    return copy.flatten(2, 3).flatten(0, 1)


def _mask(scores: Tensor, repeats: int, query: int, key: int, bias: Tensor | None) -> None:
    """Add the mask to scores (B G, n R, m) of n queries starting at `query` and m keys starting at `key`.

    Without a bias only the block on the diagonal is masked; its size is the shorter side.
    """
    scores = scores.unflatten(1, (-1, repeats))
    if bias is not None:
        visible = bias[:, :, query : query + scores.shape[1], None, key : key + scores.shape[3]]
        scores.unflatten(0, (len(bias), -1)).add_(visible)
        return
    block, first = min(scores.shape[1], scores.shape[3]), query - key
    causal = torch.full((block, block), -math.inf, dtype=scores.dtype).triu_(1)
    scores[:, :block, :, first : first + block].add_(causal[:, None])
