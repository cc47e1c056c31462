"""The two ends of the model: vocabulary-parallel embedding, final norm and output head.

Shapes: B rows, T tokens of this rank, D hidden size, V vocabulary, tp ranks; S = T / tp under sequence parallelism,
else T.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ds.config.document_marks import DocumentMarks
from llama_ds.layout.mup import inverse_width
from llama_ds.layout.vocab_parts import own_rows
from llama_ds.layout.weights import EMBEDDING
from llama_ds.model.decoder import Hidden, Ids, LayerContext
from llama_ds.model.linear import describe

EMBEDDING_LAYER = -1  # layer number in the seeds of initial weights; decoder layers are 0 .. L - 1
HEAD_LAYER = -2


def document_starts(ids: Tensor, marks: DocumentMarks) -> Tensor:
    """Return for each token the position at which its document begins: (B, T) ids -> (B, T) int32.

    A row that starts in the middle of a document counts as starting one.
    """
    return starts_of(F.pad(ids[:, :-1] == marks.eos, (1, 0)) if marks.begin is None else ids == marks.begin)


def starts_of(begins: Tensor) -> Tensor:
    """Return what `document_starts` does, for whether each token (B, T) begins a document."""
    position = torch.arange(begins.shape[1], device=begins.device, dtype=torch.int32)
    return torch.where(begins, position, 0).cummax(1).values.to(torch.int32)


class VocabParallelEmbedding(nn.Module):
    """Look up this rank's part of the vocabulary; other tokens contribute zero to the sum over ranks."""

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        model, tp = context.model, context.tp
        self.tp = tp
        self.cp, self.caches = context.cp, context.caches
        self.document_mask, self.marks = context.document_mask, context.marks
        self.weight = context.parameter(EMBEDDING, EMBEDDING_LAYER)
        self.own = own_rows(model.vocab_size, tp.rank, tp.size)
        self.whole = EMBEDDING.shape(model)

    def forward(self, inputs: Ids) -> Hidden:
        """(B, T) -> (B, S, D), paired with document_start if documents are masked.

        Raises:
            ValueError: context-parallel ranks, which do not have all ids of a row, are not given document_start.
        """
        ids, start = inputs if isinstance(inputs, tuple) else (inputs, None)
        x = self.tp.leave(self.lookup(ids))
        if not self.document_mask or self.caches.cache is not None:  # generated text and its context are one document
            return x
        if start is None and self.cp.size > 1:
            raise ValueError("the ids of a context-parallel rank do not say where the documents of a row begin")
        return x, document_starts(ids, self.marks) if start is None else start

    def lookup(self, ids: Tensor) -> Tensor:
        """(B, T) -> partial sums (B, T, D)."""
        if self.tp.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.own.start
        absent = (local < 0) | (local >= len(self.own))
        rows = F.embedding(local.masked_fill(absent, 0), self.weight)
        return rows.masked_fill(absent[..., None], 0.0)

    def extra_repr(self) -> str:
        return describe(self.weight, self.tp, EMBEDDING.cut, self.whole)


class FinalNorm(nn.Module):
    """The norm before the head, with muP's factor of the logits; it drops document_start."""

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        self.norm = context.norm("norm")
        self.factor = inverse_width(context.model)

    def forward(self, inputs: Hidden) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = self.norm(inputs[0] if isinstance(inputs, tuple) else inputs)
        return x if self.factor == 1 else x * self.factor


Then = Callable[[Tensor, Tensor], Tensor]


class Head(nn.Module):
    """The output matrix W (V / tp rows, rounded up, D); the loss computes the logits x W^T chunk by chunk."""

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        self.lm_head = context.linear("lm_head", HEAD_LAYER)

    def forward(self, x: Tensor, then: Then | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return (x, W) for x (B, S, D), or then(x, W): under ZeRO-3, W is gathered only within this call."""
        weight = self.lm_head.weight
        return (x, weight) if then is None else then(x, weight)


def tied_head(embedding: VocabParallelEmbedding, x: Tensor, then: Then | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Do what `Head.forward` does for x (B, S, D), with the embedding's weight."""
    return (x, embedding.weight) if then is None else then(x, embedding.weight)
