"""A block of attention by matrix products: queries of one part of a row, keys of another, or of the same documents.

Shapes: B rows, Q queries, S keys, G key-value heads, R query heads of each, H = G R, K head size. Arithmetic is in
float32 or wider. A block of scores is freed before the next one is computed. `first` (B or 1, Q) says which keys a
query sees: those from the first to its own, with Q = S, or none if that is later. None: it sees all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

SCORES = 1 << 24  # elements of a block of scores


def block_forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return out (B, Q, H, K) and logsumexp (B, H, Q) of q (B, Q, H, K) over k and v (B, S, G, K)."""
    queries, keys, values = _wide(q).unflatten(2, (k.shape[2], -1)), _wide(k), _wide(v)
    out = torch.empty(q.shape, dtype=queries.dtype, device=q.device)
    lse = queries.new_empty(q.shape[0], q.shape[2], q.shape[1])
    for part in _parts(q, k):
        scores = _scores(queries[:, part], keys, first, part)  # (B, G, R, q, S)
        found = scores.logsumexp(-1)
        p = scores.sub_(found.clamp(min=torch.finfo(found.dtype).min)[..., None]).exp_()  # 0 for a query without keys
        out[:, part] = torch.einsum("bgrqs,bsgk->bqgrk", p, values).flatten(2, 3)
        lse[:, :, part] = found.flatten(1, 2)
    return out, lse


def block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the block's part of (dL/dq, dL/dk, dL/dv); grad = dL/dout, `out` and `lse` are those over all keys."""
    groups = k.shape[2]
    queries, keys, values = _wide(q).unflatten(2, (groups, -1)), _wide(k), _wide(v)
    grads = _wide(grad).unflatten(2, (groups, -1))
    inner = (grads * _wide(out).unflatten(2, (groups, -1))).sum(-1)  # rowsum(dO * O): (B, Q, G, R)
    grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for part in _parts(q, k):
        p = _scores(queries[:, part], keys, first, part)
        p = p.sub_(_wide(lse)[:, :, part].unflatten(1, (groups, -1))[..., None]).exp_()
        grad_v += torch.einsum("bgrqs,bqgrk->bsgk", p, grads[:, part])
        grad_s = torch.einsum("bqgrk,bsgk->bgrqs", grads[:, part], values)
        grad_s = grad_s.sub_(inner[:, part].permute(0, 2, 3, 1)[..., None]).mul_(p).mul_(1 / math.sqrt(q.shape[-1]))
        grad_q[:, part] = torch.einsum("bgrqs,bsgk->bqgrk", grad_s, keys)
        grad_k += torch.einsum("bgrqs,bqgrk->bsgk", grad_s, queries[:, part])
    return grad_q.flatten(2, 3), grad_k, grad_v


def _scores(queries: Tensor, keys: Tensor, first: Tensor | None, part: slice) -> Tensor:
    scores = torch.einsum("bqgrk,bsgk->bgrqs", queries, keys).mul_(1 / math.sqrt(keys.shape[-1]))
    if first is None:
        return scores
    key = torch.arange(keys.shape[1], device=keys.device)
    hidden = (key < first[:, part, None]) | (key > key[part, None])  # (B or 1, q, S)
    return scores.masked_fill_(hidden[:, None, None], -math.inf)


def _parts(q: Tensor, k: Tensor) -> Iterator[slice]:
    step = max(1, SCORES // (q.shape[0] * q.shape[2] * k.shape[1]))
    return (slice(start, start + step) for start in range(0, q.shape[1], step))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
