"""The sources of a run, opened and checked against its run file; its validation rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_ds.config.row_stages import SEQ_LEN
from llama_ds.config.schema import DataConfig, SourceConfig
from llama_ds.data.filler import mark_filler
from llama_ds.data.source.cache import Cache
from llama_ds.data.source.manifest import Manifest, check_tokenizer
from llama_ds.data.source.remote import RetryPolicy
from llama_ds.data.source.shards import Source, read_manifest, with_digests
from llama_ds.data.source.store import BadFile, open_store
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError


@dataclass(frozen=True)
class Sources:
    """The opened sources of a run. Rows are (seq_len + 1,): inputs row[:-1], labels row[1:], with marked filler."""

    config: DataConfig
    tokenizer: Tokenizer
    train: list[Source]  # in the order of config.sources
    validation: list[Source]

    def validation_rows(self, rows: int) -> np.ndarray:
        """Return `rows` validation rows, int64 (rows, seq_len + 1); see the function `validation_rows`."""
        return validation_rows(self.validation, self._weights, rows)

    def validation_shares(self, rows: int) -> list[int]:
        """Return how many of `rows` validation rows are of each source; see the function `validation_shares`."""
        return validation_shares(self.validation, self._weights, rows)

    def validation_labels(self, rows: int) -> list[int]:
        """Return the number of labels of each source, without filler, in `rows` validation rows."""
        chosen = zip(self.validation, self.validation_shares(rows), strict=True)
        return [int(s.geometry.labels(_first_rows(s, share), s.seq_len).sum()) for s, share in chosen]

    def check_validation(self, rows: int, unit: int) -> None:
        """Check, before training starts, that the run can provide `rows` validation rows.

        unit: dp * micro_batch.

        Raises:
            UserError: `rows` is not a multiple of `unit`, or a source has too few rows.
        """
        if rows % unit:
            nearest = [n for n in (rows // unit * unit, (rows // unit + 1) * unit) if n]
            raise UserError(
                f"evaluation.rows = {rows} is not a multiple of dp * parallel.micro_batch = {unit}; "
                f"use {' or '.join(map(str, nearest))}"
            )
        self.validation_shares(rows)

    def validation_micro_batches(self, rows: int, dp_rank: int, dp_size: int, micro_batch: int) -> list[np.ndarray]:
        """Return one rank's share of the `rows` validation rows as micro-batches, int64 (micro_batch, seq_len + 1).

        Raises:
            UserError: as in `check_validation`, or a shard that holds the rows is damaged.
        """
        self.check_validation(rows, dp_size * micro_batch)
        share = self.validation_rows(rows)[rows // dp_size * dp_rank :][: rows // dp_size]
        return [share[start : start + micro_batch] for start in range(0, len(share), micro_batch)]

    @property
    def _weights(self) -> list[float]:
        return [source.weight for source in self.config.sources]


def open_sources(data: DataConfig, vocab_size: int) -> Sources:
    """Open every source of `data` and check its manifest against the run. Shards are opened when they are read.

    Raises:
        UserError: a source is unavailable, or was built with another tokenizer, vocabulary or row length.
    """
    tokenizer = Tokenizer(data.tokenizer)
    if tokenizer.vocab_size > vocab_size:  # a larger table is legal: many models pad theirs
        raise UserError(
            f"model.vocab_size = {vocab_size}, but {data.tokenizer} has {tokenizer.vocab_size} ids; "
            f"set model.vocab_size to {tokenizer.vocab_size} or more"
        )
    cache = Cache(data.cache_dir, round(data.cache_gib * 2**30)) if data.cache_dir else None
    train, validation = [], []
    for config in data.sources:
        store = open_store(config.path.replace(SEQ_LEN, str(data.seq_len)), cache, RetryPolicy(data.deadline_s))
        manifest = with_digests(store, read_manifest(store))
        check_tokenizer(manifest, tokenizer)
        _check_shapes(config, manifest, data.seq_len, vocab_size)
        train.append(Source(store, manifest, "train"))
        validation.append(Source(store, manifest, "validation"))
    return Sources(data, tokenizer, train, validation)


def validation_shares(sources: Sequence[Source], weights: Sequence[float], rows: int) -> list[int]:
    """Return how many of `rows` validation rows come from each source: by weight, with largest-remainder rounding.

    Raises:
        UserError: a source has too few rows.
    """
    shares = _largest_remainder(weights, rows)
    for source, share in zip(sources, shares, strict=True):
        intact = source.rows - sum(len(source.geometry.shard_rows(shard)) for shard in source.geometry.bad)
        if share > intact:
            raise UserError(
                f"{source.store.location}: validation split has {intact} rows, evaluation needs {share} "
                f"of its {rows}; lower evaluation.rows or build with a larger --validation-fraction"
            )
    return shares


def validation_rows(sources: Sequence[Source], weights: Sequence[float], rows: int) -> np.ndarray:
    """Return `rows` validation rows, int64 (rows, seq_len + 1): always the same first rows of each source.

    Filler is marked.

    Raises:
        UserError: a source has too few rows, or a shard that holds them is damaged.
    """
    shares = validation_shares(sources, weights, rows)
    try:
        chosen = [_read(source, _first_rows(source, share)) for source, share in zip(sources, shares, strict=True)]
    except BadFile as error:
        raise UserError(
            f"{error}; validation always reads the same rows: copy the shard again, or rebuild the source"
        ) from None
    return np.concatenate(chosen)


def _read(source: Source, rows: np.ndarray) -> np.ndarray:
    ids = source.read(rows).astype(np.int64)
    mark_filler(ids, source.geometry.labels(rows, source.seq_len))
    return ids


def _first_rows(source: Source, count: int) -> np.ndarray:
    """Return the first `count` rows of a split, without the shards that its manifest lists as damaged."""
    rows: list[int] = []
    intact = (shard for shard in range(source.geometry.shards) if shard not in source.geometry.bad)
    while len(rows) < count:
        rows += source.geometry.shard_rows(next(intact))
    return np.array(rows[:count], np.int64)


def _check_shapes(config: SourceConfig, manifest: Manifest, seq_len: int, vocab_size: int) -> None:
    if manifest.seq_len != seq_len:
        raise UserError(
            f"data.seq_len = {seq_len}, but the shards of {config.path} hold rows of {manifest.seq_len}; "
            f"set data.seq_len to {manifest.seq_len} or build them with --seq-len {seq_len}"
        )
    if manifest.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size = {vocab_size}, but the shards of {config.path} were built with "
            f"{manifest.vocab_size} ids; use the tokenizer and the vocab_size they were built with"
        )


def _largest_remainder(weights: Sequence[float], rows: int) -> list[int]:
    exact = [rows * weight / math.fsum(weights) for weight in weights]
    shares = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: rows - sum(shares)]:
        shares[i] += 1
    return shares
