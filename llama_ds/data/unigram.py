"""Unigram model of a training set: the loss of a model that knows only token frequencies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llama_ds.data.source.shards import Source
from llama_ds.data.source.store import BadFile
from llama_ds.errors import UserError

CHUNK = 4096  # rows per counting pass


def count_labels(source: Source) -> np.ndarray:
    """Return how often each id is a label in `source`, without filler: int64 (vocab_size,).

    Raises:
        UserError: a shard is damaged.
    """
    counts = np.zeros(source.vocab_size, np.int64)
    try:
        for shard, block in enumerate(source.blocks()):
            rows = np.array(source.geometry.shard_rows(shard))
            labels = source.geometry.labels(rows, source.seq_len)
            for start in range(0, len(block), CHUNK):
                part = slice(start, start + CHUNK)
                counted = np.arange(source.seq_len) < labels[part, None]
                counts += np.bincount(block[part, 1:][counted], minlength=source.vocab_size)
    except BadFile as error:
        raise UserError(f"{error}; copy the shard again, or rebuild the source") from None
    return counts


def mixture_counts(sources: Sequence[Source], weights: Sequence[float]) -> np.ndarray:
    """Return the label counts of a mixture, (vocab_size,): weighted label frequencies times the total label count."""
    counts = [count_labels(source) for source in sources]
    total = sum(int(c.sum()) for c in counts)
    return sum((w * total / c.sum() * c for c, w in zip(counts, weights, strict=True)), np.zeros(len(counts[0])))


def unigram_loss(counts: np.ndarray, rows: np.ndarray) -> float:
    """Return the unigram model's cross-entropy on the labels of `rows`, in nats per token.

    p(i) = (counts[i] + 1) / (sum(counts) + vocab_size), add-one smoothing; rows: (n, seq_len + 1), with marked filler.
    """
    nats = np.log(counts.sum() + len(counts)) - np.log(counts + 1.0)
    labels = rows[:, 1:]
    return float(nats[labels[labels >= 0]].mean())
