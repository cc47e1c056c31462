"""What a run reads: its order, the shards it needs next, and one rank's micro-batches, read ahead in a thread."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from llama_ds.config.schema import RunConfig
from llama_ds.data.mixture import LISTED, DataState, continued, planned
from llama_ds.data.order import BadShard, Order
from llama_ds.data.source.store import BadFile
from llama_ds.data.sources import Sources, open_sources
from llama_ds.errors import UserError

EPOCH_TOLERANCE = 0.1  # of the epochs that a run file states
FETCHES = 4  # shards fetched and checked at a time

T = TypeVar("T")


@dataclass(frozen=True)
class Dataset:
    """The opened data of a run, and the order in which it reads it."""

    sources: Sources
    order: Order
    start: DataState  # as the run began or resumed

    @property
    def state(self) -> DataState:
        """What a run that resumes has to know, with the shards found damaged since."""
        return replace(self.start, bad=tuple(self.order.bad))

    @property
    def fingerprint(self) -> int:
        """A number of 62 bits that two ranks share when they read the same rows of the same sources."""
        sources = [(s.name, s.rows, s.tokenizer_sha256) for s in self.sources.train]
        order = [self.order.seed, self.order.global_batch, self.order.names, self.state.as_json()]
        text = json.dumps([sources, order], sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 2

    def replace(self, found: list[BadShard], most: int) -> None:
        """Have other shards read in place of those found damaged, from the steps on that they state.

        Raises:
            UserError: they are more than `most`, with those that the manifests did not list, or a source has no other.
        """
        self.order.replace_shards(found)
        bad = self.order.bad
        unforeseen = [b for b in bad if b.reason != LISTED]
        for name, shards in self.order.shards_of(max((b.step for b in bad), default=0)).items():
            if len({b.shard for b in bad if b.source == name}) >= shards:
                raise UserError(f"source {name}: none of its {shards} shards is sound; {_ledger(bad)}")
        if len(unforeseen) > most:
            raise UserError(
                f"{len(unforeseen)} shards are damaged, data.max_bad_shards = {most}; mend them, or have them left out "
                f"with tools/shards.py verify --repair: {_ledger(unforeseen)}"
            )


def open_data(run: RunConfig, past: DataState | None = None, step: int = 0, place: str = "") -> Dataset:
    """Open the data of `run`, which starts, or resumes at `step` with the state that its checkpoint `place` holds.

    Raises:
        UserError: anything that would fail, or silently train on something else, later.
    """
    sources = open_sources(run.data, run.model.vocab_size)
    names = [source.name for source in run.data.sources]
    geometry = {name: source.geometry for name, source in zip(names, sources.train, strict=True)}
    for name, split in geometry.items():
        if not split.rows:
            raise UserError(f"data.sources: {name} has no training rows; leave it out, or build it from more text")
    state = planned(run.data, run.training.global_batch * run.data.seq_len, geometry)
    if past:
        state = continued(past, state, step, place)
    order = state.order(run.seed, run.training.global_batch)
    _check_epochs(run, order)
    dataset = Dataset(sources, order, state)
    dataset.replace([], run.data.max_bad_shards)
    return dataset


class Reader:
    """What one data-parallel rank reads in `steps`, and no further than it is allowed.

    Shards of coming steps are fetched and checked in threads. Ranks agree on which are damaged before any of them reads
    that far: `find_bad`, then `Dataset.replace` on all alike, then `allow`.
    """

    def __init__(self, dataset: Dataset, steps: range, dp_rank: int, dp_size: int, micro_batch: int) -> None:
        self._data, self._steps = dataset, steps
        self._share, self._micro_batch = (dp_rank, dp_size), micro_batch
        own = [source.name for source in dataset.sources.config.sources]
        self._source = dict(zip(map(dataset.order.names.index, own), dataset.sources.train, strict=True))
        self._allowed, self._may_read, self._closed = steps.start, threading.Condition(), threading.Event()
        self._pool = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch-shards")
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan-shards")
        self._prepared: dict[tuple[int, int], Future[list[BadShard]]] = {}

    def prepare(self, first: int, last: int) -> None:
        """Begin to fetch and check the shards of the steps from `first` to `last`."""
        self._prepared[first, last] = self._planner.submit(self._check_steps, first, last)

    def find_bad(self, first: int, last: int) -> list[BadShard]:
        """Return the damaged shards that those steps would read; empty when all they need is at hand and sound.

        Raises:
            UserError: there is no room for a shard.
        """
        prepared = self._prepared.pop((first, last), None)
        return prepared.result() if prepared else self._check_steps(first, last)

    def allow(self, last: int) -> None:
        """Let steps before `last` be read."""
        with self._may_read:
            self._allowed = last
            self._may_read.notify_all()

    def batches(self) -> Iterator[np.ndarray]:
        """Yield the micro-batches of all steps, int32 (micro_batch, seq_len + 1), as soon as they may be read.

        Step s is made of the rows s * global_batch .. (s + 1) * global_batch of the order (`Order.at`), `micro_batch`
        at a time: a step is the same rows under every layout.
        """
        for step in self._steps:
            with self._may_read:
                self._may_read.wait_for(lambda step=step: self._closed.is_set() or step < self._allowed)  # type: ignore[misc]
                if self._closed.is_set():
                    return
            rows = self._data.order.at(step, *self._share)
            for start in range(0, len(rows.row), self._micro_batch):
                if self._closed.is_set():
                    return
                here = slice(start, start + self._micro_batch)
                yield self._read(rows.source[here], rows.row[here])

    def close(self) -> None:
        """Give up what was not read or fetched yet."""
        with self._may_read:
            self._closed.set()
            self._may_read.notify_all()
        for pool in (self._planner, self._pool):
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, source: np.ndarray, row: np.ndarray) -> np.ndarray:
        out = np.empty((len(row), self._data.sources.config.seq_len + 1), np.int32)
        for index in np.unique(source):
            places = source == index
            try:
                out[places] = self._source[int(index)].read(row[places])
            except BadFile as error:
                raise UserError(
                    f"{error}; the run cannot tell what it read: resume it, and the shard is replaced"
                ) from None
        return out

    def _check_steps(self, first: int, last: int) -> list[BadShard]:
        needed: set[tuple[int, int]] = set()
        for step in range(first, last):
            rows = self._data.order.at(step, *self._share)
            for index in np.unique(rows.source).tolist():
                shards, _ = self._source[index].geometry.locate(rows.row[rows.source == index])
                needed |= {(index, shard) for shard in np.unique(shards).tolist()}
        checks = [self._pool.submit(self._check, first, *shard) for shard in sorted(needed)]
        return [bad for check in checks if (bad := check.result())]

    def _check(self, step: int, index: int, shard: int) -> BadShard | None:
        source = self._source[index]
        try:
            source.check(shard)
        except BadFile as error:
            return BadShard(step, self._data.order.names[index], shard, str(error), source.offset_of(shard, error))
        return None


class ReadAhead(Generic[T]):
    """Items drawn from an iterator by a thread; an error there is raised where they are consumed.

    `wait_s` adds up the seconds that the consumer waited.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self.wait_s = 0.0
        self._items = items
        self._queue: queue.Queue[T | BaseException] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> ReadAhead[T]:
        return self

    def __next__(self) -> T:
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
            for item in self._items:
                self._queue.put(item)
                if self._closed.is_set():
                    return
            self._queue.put(StopIteration())
        except BaseException as error:  # to the consumer, whatever it is: a dead thread would be a hang
            self._queue.put(error)


def _check_epochs(run: RunConfig, order: Order) -> None:
    """Hold the epochs that the run file states against what its steps read."""
    consumed = order.consumed(run.training.steps)
    for source in run.data.sources:
        rows, epochs = consumed[source.name]
        if source.epochs is None or abs(epochs - source.epochs) <= EPOCH_TOLERANCE * source.epochs:
            continue
        raise UserError(
            f"data.sources: {source.name} states epochs = {source.epochs:g}, but {rows} of the run's "
            f"{run.training.steps * run.training.global_batch} rows, from the shards of {source.path}, "
            f"are {epochs:.3g}; set epochs to {epochs:.3g}, or change the weight, the steps or the source"
        )


def _ledger(bad: list[BadShard]) -> str:
    return "; ".join(f"step {b.step}, {b.source}, shard {b.shard}: {b.reason}" for b in bad)
