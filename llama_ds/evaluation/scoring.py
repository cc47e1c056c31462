"""Log-likelihoods of requests by a backend: a model in one process, or the engine of a run under its layout.

Shapes: b rows of a micro-batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from llama_ds.config.document_marks import DocumentMarks
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.evaluation.branching import branched
from llama_ds.evaluation.generation import Decoder, ModelDecoder, TextGenerator
from llama_ds.evaluation.packing import PackedRow, micro_batches, packed, padded, row_lengths
from llama_ds.evaluation.requests import Encoded, Score, ScoringRequest, encode, rolling
from llama_ds.log import logger
from llama_ds.model.branched_rows import BranchedRows
from llama_ds.model.cached_layer import join_products
from llama_ds.model.decoder import LayerContext
from llama_ds.model.llama import Llama
from llama_ds.model.loss import IGNORED

T = TypeVar("T")
LONGEST_BRANCHED = 4096  # tokens of a branched row: its mask has the square of them


@dataclass(frozen=True)
class RowShape:
    """The rows that a backend takes."""

    seq_len: int
    micro_batch: int
    document_mask: bool
    marks: DocumentMarks
    dp: int = 1  # ranks among whom plain rows are divided
    ranks: int = 1  # ranks among whom branched rows are divided
    any_length: bool = True  # whether rows may be shorter than seq_len
    multiple: int = 1  # divides the number of tokens of every plain row
    few_lengths: bool = True  # whether a further length of rows costs time, as where kernels are compiled for it
    unbranched: str = ""  # why texts with a common prefix cannot share it in a row; empty: they can
    longest_branched: int = LONGEST_BRANCHED


class Backend(Protocol):
    """Computes what the layers say of rows. Every rank of a job calls it with the same rows."""

    shape: RowShape

    def scores(self, micro_batches: Sequence[list[PackedRow]], tokens: int, branched: bool) -> dict[int, Score]:
        """Return the score of every request in the rows, on every rank. Collective under an engine.

        Micro-batch i belongs to rank i % dp of `shape`, one of branched rows to i % ranks. All have the same number of
        rows of `tokens` tokens.
        """

    def decoder(self) -> Decoder:
        """Return what continues texts with the same layers."""

    def once(self, work: Callable[[], T]) -> T:
        """Return on every rank what `work` returns on the first, the only one that does it. Collective."""


Tick = Callable[[int], object]  # gets the number of requests just scored


class Scorer:
    """Scores texts with a backend, and continues them."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer) -> None:
        self.backend, self.tokenizer = backend, tokenizer
        self._said_plain = False  # whether the reason for plain rows has been logged

    @cached_property
    def generator(self) -> TextGenerator:
        """What continues texts with the same layers."""
        return TextGenerator(self.backend.decoder(), self.tokenizer)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the largest cache of continuations so far on this rank; 0 without any."""
        generator = self.__dict__.get("generator")  # not made here
        return generator.cache_bytes if generator else 0

    def log_likelihoods(self, requests: Sequence[ScoringRequest], tick: Tick = lambda count: None) -> list[Score]:
        """Return the log-likelihood of each continuation after its context. Collective under an engine.

        Raises:
            UserError: a continuation is empty or longer than a row, or the tokenizer has no bos.
        """
        seq_len = self.backend.shape.seq_len
        encoded = [encode(self.tokenizer, request, seq_len) for request in requests]
        scores = self.scores(encoded, tick)
        return [replace(score, truncated=one.cut > 0) for score, one in zip(scores, encoded, strict=True)]

    def rolling_log_likelihoods(self, texts: Sequence[str], tick: Tick = lambda count: None) -> list[float]:
        """Return the log-likelihood of each text, in nats: every token is predicted once. Collective."""
        windows = [rolling(self.tokenizer, text, self.backend.shape.seq_len) for text in texts]
        scores = iter(self.scores([window for text in windows for window in text], tick))
        return [sum(next(scores).log_likelihood for _ in text) for text in windows]

    def scores(self, requests: Sequence[Encoded], tick: Tick = lambda count: None) -> list[Score]:
        """Return the score of each request; equal ones are computed once. Collective under an engine."""
        shape = self.backend.shape
        distinct = list(dict.fromkeys(requests))
        found: dict[Encoded, Score] = {}
        limit = 0 if shape.unbranched else min(shape.longest_branched, shape.seq_len) + 1
        for branches in (False, True):
            chosen = [request for request in distinct if (len(request.ids) <= limit) == branches]
            if chosen and not branches:
                self._say_plain()
            rows_of = self._branched if branches else self._plain
            for tokens, rows in sorted(rows_of(chosen).items(), reverse=True):
                ranks = shape.ranks if branches else shape.dp
                batches = list(micro_batches(rows, shape.micro_batch, ranks, shape.marks.eos))
                scores = self.backend.scores(batches, tokens, branches)
                found.update((chosen[number], score) for number, score in scores.items())
                tick(len(scores))
        tick(len(requests) - len(distinct))
        return [found[request] for request in requests]

    def _branched(self, requests: Sequence[Encoded]) -> dict[int, list[PackedRow]]:
        shape = self.backend.shape
        lengths = row_lengths(min(shape.longest_branched, shape.seq_len), few=shape.few_lengths)
        return branched(requests, lengths, shape.marks.eos)

    def _plain(self, requests: Sequence[Encoded]) -> dict[int, list[PackedRow]]:
        shape = self.backend.shape
        lengths = row_lengths(shape.seq_len, shape.multiple, shape.few_lengths) if shape.any_length else [shape.seq_len]
        if shape.document_mask and shape.marks.begin is not None:
            longest = max((len(request.ids) for request in requests), default=1)
            return packed(requests, next(length for length in lengths if length + 1 >= longest), shape.marks)
        return padded(requests, lengths, shape.marks.eos)

    def _say_plain(self) -> None:
        shape = self.backend.shape
        if not self._said_plain:
            why = shape.unbranched or f"some requests have more than {shape.longest_branched} tokens"
            logger.info("evaluation: rows without shared prefixes: %s", why)
            self._said_plain = True


def sums(rows: Sequence[PackedRow], losses: Tensor, greedy: Tensor) -> dict[int, Score]:
    """Return the scores of the requests in rows from their tokens' losses and greedy flags, (b, T) each."""
    every, hits = losses.double().cpu().numpy(), greedy.cpu().numpy()
    return {
        slot.request: Score(-float(every[i, slot.start : slot.stop].sum()), bool(hits[i, slot.start : slot.stop].all()))
        for i, row in enumerate(rows)
        for slot in row.slots
    }


def why_unbranched(context: LayerContext) -> str:
    """Return why texts cannot share a common prefix in the rows of these layers; empty: they can."""
    if not rows_of_any_length(context.model.rope_scaling):
        return "under dynamic rotary scaling the frequencies depend on the length of a row"
    if context.document_mask and context.marks.begin is None:
        # Under document masks, eos ends a document where the tokenizer has no bos of its own.
        return "documents are masked and begin behind an eos, which a text does not see"
    return ""


def branches_of(rows: Sequence[PackedRow], context: LayerContext, device: torch.device) -> BranchedRows:
    """Return what the layers of `context` need of a micro-batch of branched rows."""
    tokens = len(rows[0].ids) - 1
    return BranchedRows([row.texts for row in rows], tokens, context.rotary, device)


def stacked(rows: Sequence[PackedRow]) -> np.ndarray:
    """Return the ids of a micro-batch, (b, T + 1), marked where they are no labels."""
    return np.stack([row.ids for row in rows])


class ModelBackend:
    """A model on one device, without an engine."""

    def __init__(self, model: Llama, micro_batch: int) -> None:
        context = model.context
        self.model = model.eval()
        join_products(model)
        self._decoder: Decoder | None = None
        self.shape = RowShape(
            context.rotary.seq_len,
            micro_batch,
            context.document_mask,
            context.marks,
            any_length=rows_of_any_length(context.model.rope_scaling),
            few_lengths=next(model.parameters()).is_cuda,
            unbranched=why_unbranched(context),
        )

    @torch.no_grad()
    def scores(self, micro_batches: Sequence[list[PackedRow]], tokens: int, branched: bool) -> dict[int, Score]:
        loss, context, device = self.model.loss, self.model.context, next(self.model.parameters()).device
        found: dict[int, Score] = {}
        loss.scores, loss.labels = [], 1.0
        try:
            for padded_rows in micro_batches:
                rows = [row for row in padded_rows if row.slots]  # alone, nobody waits for the empty ones
                marked = torch.from_numpy(stacked(rows)).to(device)
                labels = marked[:, 1:].masked_fill(marked[:, 1:] < 0, IGNORED)
                seen = branches_of(rows, context, device) if branched else None
                with context.caches.using(seen):
                    self.model(torch.where(marked < 0, ~marked, marked)[:, :-1], labels)
                found |= sums(rows, *loss.scores.pop())
        finally:
            loss.scores, loss.labels = None, None
        return found

    def decoder(self) -> Decoder:
        self._decoder = self._decoder or ModelDecoder(self.model, self.shape.micro_batch)
        return self._decoder

    def once(self, work: Callable[[], T]) -> T:
        return work()


def rows_of_any_length(scaling: object) -> bool:
    """Return whether a row's length does not change the rotary frequencies, as it does under `dynamic` scaling."""
    return getattr(scaling, "rope_type", None) != "dynamic"
