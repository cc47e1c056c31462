"""Next-token cross-entropy over a vocabulary that is cut over the tensor-parallel ranks.

Shapes: N = B * T tokens, V vocabulary, tp ranks; each rank holds logits (N, V / tp). Full logits never exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llama_ds.model.tensor_parallel import TensorParallel

CHUNK_ELEMENTS = 1 << 18  # float32 temporaries are this large at most: they stay in a CPU core's cache


class _VocabParallelLoss(torch.autograd.Function):
    """mean(lse - logit[label] + z_weight * lse^2) with lse = log sum exp over the whole vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tp: TensorParallel, z_weight: float) -> Tensor:
        local = labels - tp.rank * logits.shape[1]
        here = (local >= 0) & (local < logits.shape[1])
        index = local.masked_fill(~here, 0)[:, None]
        lse = _log_sum_exp(logits)  # (N,) over this rank's part
        target = torch.where(here, logits.gather(1, index)[:, 0].to(lse.dtype), 0.0)
        if tp.size > 1:
            # log sum exp of the parts; one collective carries both sums.
            top = tp.all_reduce_max(lse)
            total, target = tp.all_reduce_sum(torch.stack([(lse - top).exp(), target])).unbind()
            lse = total.log() + top
        ctx.save_for_backward(logits, lse, index, here)
        ctx.z_weight = z_weight
        return (lse - target + z_weight * lse.square()).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, lse, index, here = ctx.saved_tensors
        scale = grad.to(lse.dtype) / len(lse)
        # d lse / d logit_v = softmax_v, so dL / d logit_v = (softmax_v (1 + 2 z lse) - [v = label]) / N.
        weight = (scale * (1 + 2 * ctx.z_weight * lse))[:, None]
        out = torch.empty_like(logits)
        for part, part_lse, part_weight, part_out in zip(
            _chunks(logits), _chunks(lse, logits), _chunks(weight, logits), _chunks(out), strict=True
        ):
            wide = part_out if part_out.dtype == lse.dtype else torch.empty_like(part, dtype=lse.dtype)
            part_out.copy_(torch.sub(part, part_lse[:, None], out=wide).exp_().mul_(part_weight))
        out.scatter_add_(1, index, torch.where(here, -scale, 0.0)[:, None].to(out.dtype))
        return out, None, None, None


def _chunks(x: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    columns = (x if like is None else like).shape[1]
    return x.split(max(1, CHUNK_ELEMENTS // columns))


def _log_sum_exp(logits: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.cat([part.to(dtype).logsumexp(1) for part in _chunks(logits)])


class NextTokenLoss(nn.Module):
    """Mean cross-entropy in nats per token, plus z-loss while training (PaLM, arXiv 2204.02311, section 5)."""

    def __init__(self, tp: TensorParallel, z_weight: float = 0.0) -> None:
        super().__init__()
        self.tp = tp
        self.z_weight = z_weight

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of logits (B, T, V / tp) and labels (B, T)."""
        z_weight = self.z_weight if torch.is_grad_enabled() else 0.0
        return _VocabParallelLoss.apply(logits.flatten(0, 1), labels.flatten(), self.tp, z_weight)
