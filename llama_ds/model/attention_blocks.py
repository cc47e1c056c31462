"""Blockwise causal attention on a CPU as batched matrix products, for rows so short that it beats torch's kernel.

Shapes as in `llama_ds.model.attention_kernels`. Internally the R = H / G query heads of a key-value head are rows of
one matrix, (B G, T R, K), so no key is repeated. Blocks above the diagonal are skipped, and a block of scores is freed
before the next one is computed, so the full attention matrix never exists. Arithmetic is in float32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 64  # queries or keys per block
# With oneDNN products (`cpu_products`), rows up to this length take 0.4 to 0.8 of the time of torch's kernel in float32
# and bfloat16; rows of 1024 tokens take as long. With MKL's products there is no gain: 0.7 to 1.1.
MAX_ROW_TOKENS = 512


def blocked_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return out (B, T, H, K) and the scores' logsumexp (B G, T R, 1); `bias` (B, 1, T, T) is added to the scores.

    Each block of queries multiplies the keys up to its end. `bias` also masks later keys; None masks only those.
    """
    groups, repeats = k.shape[2], q.shape[2] // k.shape[2]
    queries, keys, values = _by_group(q, groups, _scale(q)), _by_group(k, groups), _by_group(v, groups)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(*queries.shape[:2], 1, dtype=queries.dtype)
    for start, end in _blocks(q.shape[1]):
        rows = slice(start * repeats, end * repeats)
        scores = torch.bmm(queries[:, rows], keys[:, :end].contiguous().transpose(1, 2))
        _mask(scores, repeats, start, 0, bias)
        top = scores.amax(-1, keepdim=True)
        total = scores.sub_(top).exp_().sum(-1, keepdim=True)
        torch.add(top, total.log(), out=lse[:, rows])
        part = _grouped(out, groups)[:, :, start:end]
        part.copy_(torch.bmm(scores, values[:, :end]).div_(total).view(part.shape))
    return out, lse


def blocked_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dL/dq, dL/dk, dL/dv) for grad = dL/dout: one block of keys at a time, with all queries from its start.

    The gradients of a block's keys are final at once; only those of the queries are accumulated.
    """
    length, groups, repeats = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    queries, keys, values = _by_group(q, groups, _scale(q)), _by_group(k, groups), _by_group(v, groups)
    grads = _by_group(grad, groups)
    inner = (grads * _by_group(out, groups)).sum(-1, keepdim=True)  # rowsum(dO * O)
    grad_q, grad_k, grad_v = torch.zeros_like(queries), torch.empty_like(keys), torch.empty_like(values)
    for start, end in _blocks(length):
        rows, block = slice(start * repeats, None), slice(start, end)
        own_q, own_grads = queries[:, rows].contiguous(), grads[:, rows].contiguous()
        p = torch.bmm(own_q, keys[:, block].transpose(1, 2))
        _mask(p, repeats, start, start, bias)
        p.sub_(lse[:, rows]).exp_()
        grad_v[:, block] = torch.bmm(p.transpose(1, 2), own_grads)
        grad_s = torch.bmm(own_grads, values[:, block].transpose(1, 2)).sub_(inner[:, rows]).mul_(p)
        grad_k[:, block] = torch.bmm(grad_s.transpose(1, 2), own_q)  # queries are already scaled
        grad_q[:, rows] += torch.bmm(grad_s, keys[:, block])
    scaled_grad_q = torch.empty(q.shape, dtype=q.dtype)
    torch.mul(grad_q.view(_grouped(q, groups).shape), _scale(q), out=_grouped(scaled_grad_q, groups))
    grad_k, grad_v = (x.view(len(q), groups, length, -1).transpose(1, 2).to(q.dtype) for x in (grad_k, grad_v))
    return scaled_grad_q, grad_k, grad_v


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def _scale(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Return a view (B, G, T, R, K) of (B, T, G R, K)."""
    return x.unflatten(2, (groups, -1)).permute(0, 2, 1, 3, 4)


def _by_group(x: Tensor, groups: int, factor: float = 1.0) -> Tensor:
    """Return a copy times `factor`: (B, T, G R, K) -> (B G, T R, K)."""
    view = _grouped(x, groups)
    copy = torch.empty(view.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    if copy.dtype == x.dtype:
        torch.mul(view, factor, out=copy)
    else:  # in two passes: a product of bfloat16 numbers would be rounded to bfloat16
        copy.copy_(view).mul_(factor)
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
