"""Fused output head and next-token cross-entropy, over a vocabulary sharded over the tensor-parallel ranks.

Shapes: B rows, T tokens, N = B * T, D hidden size, V vocabulary, tp ranks; each rank holds W (R, D) with R = V / tp,
rounded up: the last ranks pad their rows (`layout.vocab_parts`). Logits of padding are never computed, and its gradient
is zero. The logits exist for one chunk of tokens at a time. Their gradient is computed with them in the forward, as in
liger-kernel's fused linear cross-entropy (arXiv 2410.10989, section 3.2): three matrix products in all, none repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from llama_ds.layout.loss_chunks import chunk_tokens
from llama_ds.layout.vocab_parts import own_rows
from llama_ds.model.context_parallel import ContextParallel, WholeRows, whole_rows
from llama_ds.model.pointwise import compiled_for
from llama_ds.model.tensor_parallel import TensorParallel
from llama_ds.model.weight_gradients import WeightGradients, add_product

IGNORED = -100  # a label without loss, as in torch.nn.functional.cross_entropy
BLOCK_ELEMENTS = 1 << 18  # block of the softmax on a CPU: temporaries of 1 MiB stay in a core's cache


class NextTokenLoss(nn.Module):
    """Mean cross-entropy in nats per token, plus z-loss while training (PaLM, arXiv 2204.02311, section 5).

    Labels that are `IGNORED` have neither loss nor gradient. The sum over the others is divided by `labels`. An engine
    sets it to the mean number of labels of the micro-batches of a step, so that the mean of their losses is the mean
    over all labels. None: by the number of the labels given.

    Context-parallel ranks have the labels of their own tokens. They divide by labels / n of whole rows, so that the
    mean over ranks is the loss.
    """

    def __init__(
        self,
        tp: TensorParallel,
        z_weight: float = 0.0,
        weight_gradients: WeightGradients | None = None,
        vocab_size: int | None = None,
        cp: ContextParallel | None = None,
    ) -> None:
        """Take the group over which the vocabulary is sharded.

        Args:
            z_weight: scales the z-loss.
            weight_gradients: receives the gradient of W; None: autograd does.
            vocab_size: V, which W does not tell if several ranks share it; None: all rows of W.
            cp: the group that shares rows; None: this rank has whole rows.

        Raises:
            ValueError: several ranks share the vocabulary, and its size is not given.
        """
        super().__init__()
        if vocab_size is None and tp.size > 1:
            raise ValueError("a vocabulary sharded over ranks needs vocab_size, because a shard may be padded")
        self.tp = tp
        self.cp = cp or WholeRows()
        self.z_weight = z_weight
        self.weight_gradients = weight_gradients or WeightGradients()
        self.vocab_size = vocab_size
        self.labels: float | None = None
        # While this is a list, each forward without gradients appends the losses (B, T), which are 0 where the label is
        # ignored, and whether each label is the most likely token (B, T).
        self.scores: list[tuple[Tensor, Tensor]] | None = None

    def forward(self, head: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """Return the scalar loss of head = (hidden states (B, S, D), W (R, D)) and labels (B, T).

        Raises:
            ValueError: context-parallel ranks, which do not have all labels of a row, are not told their number.
        """
        x, weight = head
        divisor = self.labels
        if self.cp.size > 1:
            if divisor is None:
                raise ValueError("a context-parallel rank cannot count the labels of whole rows; set `labels`")
            divisor /= self.cp.size
        return _HeadLoss.apply(x, weight, labels, self, divisor, torch.is_grad_enabled())

    def own_rows(self, held: int) -> range:
        """Return the ids whose rows this rank holds, in `held` rows of W."""
        return range(held) if self.vocab_size is None else own_rows(self.vocab_size, self.tp.rank, self.tp.size)

    def extra_repr(self) -> str:
        return f"z-loss {self.z_weight:g}"


class _HeadLoss(Function):
    """Mean of lse - logit[label] + z lse^2 with logits = x W^T and lse = log sum exp over the whole vocabulary.

    N below is the divisor of the mean, `divisor`; None: the number of labels that count.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        owner: NextTokenLoss,
        divisor: float | None,
        training: bool,
    ) -> Tensor:
        tp, z_weight = owner.tp, owner.z_weight if training else 0.0
        whole = tp.start_gather(x)()
        shape = labels.shape
        rows, labels = whole.flatten(0, 1), labels.flatten()
        counted = None
        if not training and owner.scores is not None:  # each label's own score: the others need no logits
            counted = (labels != IGNORED).nonzero()[:, 0]
            rows, labels = rows[counted], labels[counted]
        wide = torch.promote_types(x.dtype, torch.float32)
        losses = torch.empty(len(rows), dtype=wide, device=x.device)
        grad_x = torch.empty_like(rows) if training else None
        grad_weight = torch.empty(weight.shape, dtype=wide, device=x.device) if training else None
        # None: all labels count, and the host knows it.
        ignored = None if divisor == len(labels) else labels == IGNORED
        total = len(labels) if ignored is None else divisor or (~ignored).sum().to(wide)
        size = max(1, chunk_tokens(len(rows), rows.shape[1], len(weight)))
        ids = owner.own_rows(len(weight))
        greedy = None if counted is None else torch.empty_like(labels, dtype=torch.bool)
        own_weight, own_grad = weight[: len(ids)], None
        if grad_weight is not None:
            grad_weight[len(ids) :] = 0.0
            own_grad = grad_weight[: len(ids)]
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            logits = rows[part] @ own_weight.t()
            lse, target, places, here = _log_sum_exp(logits, labels[part] - ids.start, tp)
            torch.add(lse - target, lse.square(), alpha=z_weight, out=losses[part])
            factor = (1 + 2 * z_weight * lse) / total
            if ignored is not None:
                losses[part].masked_fill_(ignored[part], 0.0)
                factor.masked_fill_(ignored[part], 0.0)
            if greedy is not None:
                greedy[part] = most_likely(logits, ids.start, tp) == labels[part]
            if grad_x is None or own_grad is None:
                continue
            # d lse / d logit_v = softmax_v, so dL / d logit_v = (softmax_v (1 + 2 z lse) - [v = label]) / N.
            _softmax_(logits, lse, factor)
            # Not scatter_add_, which on a CPU passes over all logits.
            logits.view(-1).index_add_(0, places, torch.where(here, -1.0 / total, 0.0).to(logits.dtype))
            torch.mm(logits, own_weight, out=grad_x[part])  # dx = dlogits W
            if start + size >= len(rows):
                reduced = tp.start_reduce(grad_x.view_as(whole))  # overlaps with the last product of dW
            if start == 0 and wide == logits.dtype:
                torch.mm(logits.t(), rows[part], out=own_grad)  # dW = dlogits^T x
            else:
                add_product(own_grad if start else own_grad.zero_(), logits, rows[part])
        if counted is not None and greedy is not None and owner.scores is not None:
            spread = (of.new_zeros(shape.numel()).index_copy_(0, counted, of).view(shape) for of in (losses, greedy))
            every, hits = (whole_rows(values, owner.cp) for values in spread)
            owner.scores.append((every, hits))
        if grad_weight is not None:
            ctx.save_for_backward(reduced(), grad_weight)
            ctx.owner, ctx.weight = owner, weight
        return losses.mean() if ignored is None else losses.sum() / total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        factor = grad if grad.is_cuda or grad != 1 else None  # on CUDA, reading it would synchronise
        if factor is not None:
            grad_x = grad_x * factor  # out of place: with retain_graph the saved gradients are read again
        return grad_x, ctx.owner.weight_gradients.add(ctx.weight, grad_weight, factor), None, None, None, None


def _log_sum_exp(logits: Tensor, local: Tensor, tp: TensorParallel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (n,): lse, the labels' logits, their places in the flat logits, and whether a label is local.

    `local` are the labels, counted from this rank's first row. The place of another is that of a row's first logit.
    """
    here = (local >= 0) & (local < logits.shape[1])
    index = local.masked_fill(~here, 0)
    wide = torch.promote_types(logits.dtype, torch.float32)
    by_rows = compiled_for(logits, _rows_log_sum_exp)
    lse = torch.cat([by_rows(logits[part]) for part in _blocks(logits)])
    places = torch.arange(len(logits), device=logits.device) * logits.shape[1] + index
    target = torch.where(here, logits.view(-1)[places].to(wide), 0.0)
    if tp.size > 1:
        # Log-sum-exp over the shards; one collective carries both sums.
        top = tp.all_reduce_max(lse)
        total, target = tp.all_reduce_sum(torch.stack([(lse - top).exp(), target])).unbind()
        lse = total.log() + top
    return lse, target, places, here


def most_likely(logits: Tensor, first_id: int, tp: TensorParallel) -> Tensor:
    """Return the ids (n,) of the largest logits of the whole vocabulary; among equal ones the lowest, as argmax does.

    `first_id` is the id of this rank's first row of W.
    """
    top, index = logits.max(1)
    ids = index + first_id
    if tp.size > 1:
        absent = torch.iinfo(ids.dtype).min
        ids = -tp.all_reduce_max(torch.where(top == tp.all_reduce_max(top), -ids, absent))
    return ids


def _rows_log_sum_exp(logits: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = wide.amax(1, keepdim=True)
    return torch.sub(wide, top).exp_().sum(1).log_().add_(top[:, 0])  # on a CPU 0.6 x the time of torch.logsumexp


def _softmax_(logits: Tensor, lse: Tensor, factor: Tensor) -> None:
    """Compute logits = exp(logits - lse) * factor in place, with the arithmetic in the dtype of lse."""
    by_rows = compiled_for(logits, _rows_softmax_)
    for part in _blocks(logits):
        by_rows(logits[part], lse[part, None], factor[part, None])


def _rows_softmax_(logits: Tensor, lse: Tensor, factor: Tensor) -> None:
    logits.copy_(logits.to(lse.dtype).sub_(lse).exp_().mul_(factor))  # float32 logits in place


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Return blocks of rows that fit a CPU's cache; on CUDA one block of all rows."""
    step = len(logits) if logits.is_cuda else max(1, BLOCK_ELEMENTS // logits.shape[1])
    return (slice(start, start + step) for start in range(0, len(logits), step))
