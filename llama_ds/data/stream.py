"""From a run's data section to micro-batches: sources opened and checked at the start, rows read ahead in a thread."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llama_ds.config.schema import DataConfig, SourceConfig
from llama_ds.data.order import Order
from llama_ds.data.shards import Manifest, Source, check_tokenizer, read_manifest
from llama_ds.data.tokenizer import Tokenizer
from llama_ds.errors import UserError

EPOCH_TOLERANCE = 0.1  # of the epochs that a run file states


def open_data(data: DataConfig, vocab_size: int, seed: int, total_rows: int | None = None) -> Dataset:
    """Open every source of `data` and check all of it against the run: tokenizer, shapes, files, epochs.

    total_rows: rows of the whole run (steps * global_batch), to check the epochs that the run file states.

    Raises:
        UserError: anything that would fail, or silently train on something else, later.
    """
    tokenizer = Tokenizer(data.tokenizer)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"model.vocab_size = {vocab_size}, but {data.tokenizer} has {tokenizer.vocab_size} ids; "
            f"set model.vocab_size to {tokenizer.vocab_size}"
        )
    sources, validation = [], []
    for config in data.sources:
        manifest = read_manifest(config.path)
        check_tokenizer(manifest, tokenizer)
        _check_shapes(config, manifest, data.seq_len, vocab_size)
        sources.append(Source(config.path, manifest, "train"))
        validation.append(Source(config.path, manifest, "validation"))
        _check_epochs(config, sources[-1].rows, total_rows)
    order = Order(seed, [(c.name, c.weight, s.shard_rows) for c, s in zip(data.sources, sources, strict=True)])
    return Dataset(data, tokenizer, sources, validation, order)


@dataclass(frozen=True)
class Dataset:
    """The opened data of a run. Rows are (seq_len + 1,): inputs row[:-1], labels row[1:]."""

    config: DataConfig
    tokenizer: Tokenizer
    sources: list[Source]  # training rows, in the order of config.sources
    validation: list[Source]
    order: Order

    def micro_batches(
        self, first_step: int, dp_rank: int, dp_size: int, micro_batch: int, global_batch: int, accumulation: int
    ) -> MicroBatches:
        """Return the endless micro-batches of one data-parallel rank, from `first_step` on.

        Step s is made of the rows s * global_batch .. (s + 1) * global_batch of the order; rank r takes the r-th of
        dp_size equal runs of them, `micro_batch` at a time: a step is the same rows under every layout.

        Yields int64 (micro_batch, seq_len + 1).
        """
        if global_batch != dp_size * micro_batch * accumulation:
            raise ValueError(f"global batch {global_batch} != dp {dp_size} * micro {micro_batch} * {accumulation}")

        def read() -> Iterator[np.ndarray]:
            step = first_step
            while True:
                rows = self.order.at(step, global_batch, dp_rank, dp_size)
                for start in range(0, len(rows), micro_batch):
                    chosen = rows[start : start + micro_batch]
                    yield np.stack([self.sources[source].row(row) for source, _, row in chosen]).astype(np.int64)
                step += 1

        return MicroBatches(read(), depth=max(2, min(8, 2 * accumulation)))

    def validation_rows(self, rows: int) -> np.ndarray:
        """Return the run's `rows` validation rows, int64 (rows, seq_len + 1): see the function `validation_rows`."""
        return validation_rows(self.validation, [source.weight for source in self.config.sources], rows)

    def validation_micro_batches(self, rows: int, dp_rank: int, dp_size: int, micro_batch: int) -> list[np.ndarray]:
        """Return one rank's part of `validation_rows`, as int64 (micro_batch, seq_len + 1) each.

        Raises:
            UserError: `rows` is no multiple of dp_size * micro_batch, or a source has too few.
        """
        unit = dp_size * micro_batch
        if rows % unit:
            near = [n for n in (rows // unit * unit, (rows // unit + 1) * unit) if n]
            raise UserError(
                f"evaluation.rows = {rows} is not a multiple of dp {dp_size} * parallel.micro_batch "
                f"{micro_batch} = {unit}; use {' or '.join(map(str, near))}"
            )
        share = self.validation_rows(rows)[rows // dp_size * dp_rank :][: rows // dp_size]
        return [share[start : start + micro_batch] for start in range(0, len(share), micro_batch)]


def validation_rows(sources: Sequence[Source], weights: Sequence[float], rows: int) -> np.ndarray:
    """Return `rows` validation rows, int64 (rows, seq_len + 1), shared out by the weights, the same every time.

    Each source's share is found by largest remainder, and filled with its first rows.

    Raises:
        UserError: a source has too few.
    """
    shares = _largest_remainder(weights, rows)
    for source, share in zip(sources, shares, strict=True):
        if share > source.rows:
            raise UserError(
                f"{source.folder}: validation split has {source.rows} rows, evaluation needs {share} "
                f"of its {rows}; lower evaluation.rows or build with a larger --validation-fraction"
            )
    chosen = [source.row(i) for source, share in zip(sources, shares, strict=True) for i in range(share)]
    return np.array(chosen, np.int64).reshape(rows, sources[0].seq_len + 1)


class MicroBatches:
    """Micro-batches read ahead by a thread; an error while reading is raised where they are consumed.

    `wait_s` adds up the seconds that the consumer waited.
    """

    def __init__(self, batches: Iterator[np.ndarray], depth: int) -> None:
        self.wait_s = 0.0
        self._batches = batches
        self._queue: queue.Queue[np.ndarray | BaseException] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> MicroBatches:
        return self

    def __next__(self) -> np.ndarray:
        if self._closed.is_set():
            raise StopIteration
        start = time.perf_counter()
        item = self._queue.get()
        self.wait_s += time.perf_counter() - start
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Stop reading and wait for the thread to end."""
        self._closed.set()
        while self._thread.is_alive():
            with self._queue.mutex:  # make room for a reader that waits to put
                self._queue.queue.clear()
                self._queue.not_full.notify_all()
            self._thread.join(0.01)

    def _read_ahead(self) -> None:
        try:
            for batch in self._batches:
                self._queue.put(batch)
                if self._closed.is_set():
                    return
            self._queue.put(StopIteration())
        except BaseException as error:  # to the consumer, whatever it is: a dead thread would be a hang
            self._queue.put(error)


def _check_shapes(config: SourceConfig, manifest: Manifest, seq_len: int, vocab_size: int) -> None:
    if manifest.seq_len != seq_len:
        raise UserError(
            f"data.seq_len = {seq_len}, but the shards of {config.path} hold rows of {manifest.seq_len}; "
            f"set data.seq_len to {manifest.seq_len} or build them with --seq-len {seq_len}"
        )
    if manifest.vocab_size != vocab_size:
        raise UserError(
            f"model.vocab_size = {vocab_size}, but the shards of {config.path} were built with "
            f"{manifest.vocab_size} ids; use the tokenizer and the vocab_size they were built with"
        )


def _check_epochs(config: SourceConfig, rows: int, total_rows: int | None) -> None:
    if config.epochs is None or total_rows is None:
        return
    actual = total_rows * config.weight / rows
    if abs(actual - config.epochs) > EPOCH_TOLERANCE * config.epochs:
        raise UserError(
            f"data.sources: {config.name} states epochs = {config.epochs:g}, but {total_rows} rows * weight "
            f"{config.weight:g} over the {rows} rows of {config.path} make {actual:.3g}; set epochs to {actual:.3g}, "
            "or change the weight, the steps or the source"
        )


def _largest_remainder(weights: Sequence[float], rows: int) -> list[int]:
    exact = [rows * weight / math.fsum(weights) for weight in weights]
    shares = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: rows - sum(shares)]:
        shares[i] += 1
    return shares
