"""The next token of every row of a batch: greedy, or drawn, from logits that tensor parallelism cuts.

Shapes: B rows, T tokens, D hidden size, V vocabulary, tp ranks; a rank has the logits of its V / tp ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ds.layout.vocab_parts import own_rows
from llama_ds.model.decoder import LayerContext
from llama_ds.model.decoding_rule import DecodingRule
from llama_ds.model.key_value_cache import KeyValueCache
from llama_ds.model.loss import most_likely


class Draw:
    """The draws of one request. They depend on seed, prompt and number of the sample, and on nothing else."""

    def __init__(self, rule: DecodingRule, prompt: Sequence[int], sample: int) -> None:
        self.rule = rule
        digest = hashlib.sha256(repr((rule.seed, sample, tuple(prompt))).encode()).digest()
        self._key = np.frombuffer(digest[:16], np.uint64)

    def choose(self, logits: np.ndarray, step: int) -> int:
        """Return the id of token number `step` for its logits (V,)."""
        probabilities = kept_probabilities(logits, self.rule)
        point = np.random.Generator(np.random.Philox(key=self._key, counter=step)).random()
        # In the order of ids: where two logits differ by rounding only, another order would move all ids between them.
        cumulative = probabilities.cumsum()
        found = np.searchsorted(cumulative, point * cumulative[-1], side="right")
        return int(min(found, np.flatnonzero(probabilities)[-1]))


def kept_probabilities(logits: np.ndarray, rule: DecodingRule) -> np.ndarray:
    """Return softmax(logits / temperature) (V,), not normalized, with zeros for what `top_k` and `top_p` drop."""
    scaled = logits.astype(np.float64) / rule.temperature
    if 0 < rule.top_k < len(scaled):
        scaled = np.where(scaled < np.partition(scaled, -rule.top_k)[-rule.top_k], -np.inf, scaled)
    probabilities = np.exp(scaled - scaled.max())
    if rule.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]  # share of the more likely ids
        probabilities[order[before >= rule.top_p * probabilities.sum()]] = 0.0
    return probabilities


@dataclass(frozen=True)
class DecodePass:
    """The new tokens of one batch, whose cache has begun with them."""

    ids: Tensor  # (B, T)
    last: Tensor  # (B,), the column of each row's last token
    cache: KeyValueCache
    choose: Callable[[Tensor], Tensor]  # returns the next ids (B,) for this rank's logits (B, V / tp)


def own_logits(x: Tensor, weight: Tensor, last: Tensor, context: LayerContext) -> Tensor:
    """Return this rank's logits (B, V / tp) at the positions `last` (B,) of x (B, T, D), with its rows of W."""
    own = own_rows(context.model.vocab_size, context.tp.rank, context.tp.size)
    rows = x[torch.arange(len(x), device=x.device), last]
    return F.linear(rows, weight[: len(own)])


def choose_tokens(logits: Tensor, draws: Sequence[Draw | None], steps: Sequence[int], context: LayerContext) -> Tensor:
    """Return the next ids (B,) for this rank's logits (B, V / tp), the same on all tensor-parallel ranks. Collective.

    A row without a draw is greedy; `steps` are the numbers of tokens that the rows have got before.
    """
    vocab, tp = context.model.vocab_size, context.tp
    own = own_rows(vocab, tp.rank, tp.size)
    found = most_likely(logits, own.start, tp)
    drawn = [row for row, draw in enumerate(draws) if draw]
    if drawn:
        part = logits[drawn].float()
        if tp.size > 1:
            whole = part.new_zeros(len(drawn), vocab)
            whole[:, own.start : own.stop] = part
            part = tp.all_reduce_sum(whole)
        every = part.cpu().numpy()
        ids = [draw.choose(every[n], steps[row]) for n, row in enumerate(drawn) if (draw := draws[row])]
        found[drawn] = torch.tensor(ids, device=found.device)
    return found
