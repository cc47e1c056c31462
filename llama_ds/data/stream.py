"""The rows of a run in order, and the micro-batches of one rank with prefetching of their shards."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from math import gcd

import numpy as np

from llama_ds.config.batch_stages import batches_of
from llama_ds.config.row_stages import at_stage, length_begins, stage_steps
from llama_ds.config.schema import RunConfig
from llama_ds.data.filler import count_labels, mark_filler, plain_ids
from llama_ds.data.mixture import LISTED, DataState, continued, lengthened, planned
from llama_ds.data.order import BadShard, Order, Rows
from llama_ds.data.source.shards import Source
from llama_ds.data.source.store import BadFile
from llama_ds.data.sources import Sources, open_sources
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

EPOCH_TOLERANCE = 0.1  # relative deviation allowed from the epochs stated in a run file
FETCHES = 4  # shards fetched and checked concurrently


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One row that a run trains on."""

    number: int  # row number in the run, counted from 0
    step: int  # optimizer step that trains on it, counted from 0
    source: str
    epoch: int  # pass over its source, counted from 0
    row: int  # row number in the training split of its source
    ids: np.ndarray = field(repr=False)  # int32 (seq_len + 1,): inputs ids[:-1], labels ids[1:][:labels]
    labels: int  # seq_len, or fewer in the last row of a build, which filler completes
    tokenizer: Tokenizer = field(repr=False)

    @property
    def text(self) -> str:
        """The decoded ids; a row may begin and end in the middle of a document."""
        return self.tokenizer.decode(self.ids)


@dataclass(frozen=True)
class Dataset:
    """The opened data of a run and its row order."""

    sources: Sources
    order: Order
    start: DataState  # state at which the run started or resumed
    steps: int  # number of optimizer steps of the run until the rows change their length, or until its end
    first_step: int = 0  # first step with rows of this length (`data.stages`)

    def rows(self, start: int = 0, count: int | None = None) -> Iterator[TokenRow]:
        """Return an iterator over `count` rows of the run from row number `start` on, in the order of `Order.rows`.

        `Order` says which step trains on a row. `count` None: all rows up to the end of the run.

        Raises:
            UserError: the run has no such rows; during iteration, a shard is missing or damaged.
        """
        begin, total = map(self.order.batches.first_row, (self.first_step, self.steps))
        stop = total if count is None else start + count
        if not begin <= start <= stop <= total:
            raise UserError(
                f"rows from {start} to {stop}: the run has the rows {begin} to {total} in steps {self.first_step} to "
                f"{self.steps} (training.steps); ask for some of these"
            )
        return self._rows(start, stop)

    def read(self, rows: Rows) -> np.ndarray:
        """Return the ids of `rows`, int32 (len(rows.row), seq_len + 1), with marked filler. Not thread-safe.

        Raises:
            BadFile: a shard is missing or damaged.
            UserError: as in `source`.
        """
        out = np.empty((len(rows.row), self.sources.config.seq_len + 1), np.int32)
        for index in np.unique(rows.source):
            mask = rows.source == index
            out[mask] = self.source(int(index)).read(rows.row[mask])
        mark_filler(out, self._labels(rows))
        return out

    def labels(self, step: int) -> int:
        """Return the number of labels, without filler, in all rows of a step."""
        return int(self._labels(self.order.rows_of(step)).sum())

    def consumed(self, step: int) -> dict[str, tuple[int, float]]:
        """Return the (rows, epochs) of each source that the steps before `step`, with rows of this length, have read.

        A stage of `data.stages` continues the order of its own rows at its first step, as if all steps had read them.
        """
        before, read = self.order.consumed(self.first_step), self.order.consumed(step)
        return {name: (rows - before[name][0], epochs - before[name][1]) for name, (rows, epochs) in read.items()}

    def _labels(self, rows: Rows) -> np.ndarray:
        out = np.empty(len(rows.row), np.int64)
        for index in np.unique(rows.source):
            mask, source = rows.source == index, self.source(int(index))
            out[mask] = source.geometry.labels(rows.row[mask], source.seq_len)
        return out

    def source(self, index: int) -> Source:
        """Return the training split of the source that `Order.names` lists at `index`.

        Raises:
            UserError: the run has read this source, but its run file no longer names it.
        """
        name, names = self.order.names[index], [source.name for source in self.sources.config.sources]
        if name not in names:
            raise UserError(f"data.sources: {name} is missing, but these rows come from it; add it again")
        return self.sources.train[names.index(name)]

    @property
    def state(self) -> DataState:
        """The state that a resumed run needs, including the shards found damaged since the start."""
        return replace(self.start, bad=tuple(self.order.bad))

    @property
    def fingerprint(self) -> int:
        """A 62-bit hash that is equal on two ranks if they read the same rows of the same sources."""
        sources = [(s.name, s.rows, s.tokenizer_sha256) for s in self.sources.train]
        batches = asdict(self.order.batches)
        order = [self.order.seed, batches, self.order.names, self.state.as_json()]
        text = json.dumps([sources, order], sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 2

    def replace(self, found: list[BadShard], max_bad: int) -> None:
        """Replace the damaged shards `found` with intact ones, each from its `step` on.

        Raises:
            UserError: more than `max_bad` shards that no manifest lists are damaged, or a source has no intact shard.
        """
        self.order.replace_shards(found)
        bad = self.order.bad
        unlisted = [b for b in bad if b.reason != LISTED]
        for name, shards in self.order.shards_of(max((b.step for b in bad), default=0)).items():
            if len({b.shard for b in bad if b.source == name}) >= shards:
                raise UserError(f"source {name}: none of its {shards} shards is intact; {_ledger(bad)}")
        if len(unlisted) > max_bad:
            raise UserError(
                f"{len(unlisted)} shards are damaged, data.max_bad_shards = {max_bad}; repair them, or exclude them "
                f"with tools/shards.py verify --repair: {_ledger(unlisted)}"
            )

    def _rows(self, start: int, stop: int) -> Iterator[TokenRow]:
        batches, first = self.order.batches, start
        while first < stop:
            found = self.order.rows(first, min(batches.of(batches.step_of(first)), stop - first))
            try:
                read = self.read(found)
            except BadFile as error:
                raise UserError(
                    f"{error}; copy the shard again, or exclude it with tools/shards.py verify --repair"
                ) from None
            columns = (column.tolist() for column in found)
            for number, (source, epoch, row, ids) in enumerate(zip(*columns, read, strict=True), first):
                name, labels = self.order.names[source], count_labels(ids[None])
                yield TokenRow(
                    number, batches.step_of(number), name, epoch, row, plain_ids(ids), labels, self.sources.tokenizer
                )
            first += len(found.row)


def open_data(run: RunConfig, past: DataState | None = None, step: int = 0, checkpoint: str = "") -> Dataset:
    """Open the data of `run`, which starts, or resumes at `step` with the data state `past` of a checkpoint.

    Args:
        past: data state in the checkpoint; None: the run starts.
        step: number of steps completed in the checkpoint.
        checkpoint: path of the checkpoint, for messages.

    Raises:
        UserError: the data does not fit the run, which would otherwise fail later or train on other data.
    """
    run = at_stage(run, step)
    first, end = length_begins(run, step), stage_steps(run, step).stop if run.data.stages else run.training.steps
    sources = open_sources(run.data, run.model.vocab_size)
    names = [source.name for source in run.data.sources]
    geometry = {name: source.geometry for name, source in zip(names, sources.train, strict=True)}
    for name, split in geometry.items():
        if not split.rows:
            raise UserError(f"data.sources: {name} has no training rows; leave it out, or build it from more text")
    batches = batches_of(run.training)
    state = planned(run.data, batches, geometry)
    if past and first == step > 0:
        state = lengthened(past, state, step, checkpoint)
    elif past:
        reread = [source.name for source in run.data.sources if source.reread]
        state = continued(past, state, step, checkpoint, reread)
    order = state.order(run.seed, batches)
    _check_epochs(run, order)
    dataset = Dataset(sources, order, state, end, first)
    dataset.replace([], run.data.max_bad_shards)
    return dataset


class Reader:
    """Reader of the micro-batches of one data-parallel rank in `steps`, up to a bound if one is set.

    In training, threads fetch and check the shards of the next steps, and the ranks agree on the damaged shards before
    any rank reads them: `find_bad`, then `Dataset.replace` with the same shards on all ranks, then `allow`.
    """

    def __init__(
        self,
        dataset: Dataset,
        steps: range,
        dp_rank: int = 0,
        dp_size: int = 1,
        micro_batch: int = 1,
        allowed: int | None = None,
    ) -> None:
        """Prepare the reader; `batches` starts to read.

        Args:
            steps: consecutive optimizer steps, counted from 0.
            dp_rank: index of the share of each step's rows to read, out of `dp_size` equal shares.
            micro_batch: rows per batch.
            allowed: `batches` waits before this step until `allow` raises the bound; None: it never waits.

        Raises:
            UserError: the rows of a step cannot be divided into these shares and micro-batches.
        """
        batch = gcd(*dataset.order.batches.rows)
        if not 0 <= dp_rank < dp_size or micro_batch < 1 or batch % (dp_size * micro_batch):
            raise UserError(
                f"Reader: dp_rank {dp_rank} of dp_size {dp_size} with micro_batch {micro_batch}: training.global_batch "
                f"{batch} must be a multiple of dp_size * micro_batch, and dp_rank below dp_size; change one of them"
            )
        self._data, self._steps = dataset, steps
        self._share, self._micro_batch = (dp_rank, dp_size), micro_batch
        self._allowed = steps.stop if allowed is None else allowed
        self._may_read, self._closed = threading.Condition(), threading.Event()
        self._pool = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch-shards")
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan-shards")
        self._prepared: dict[tuple[int, int], Future[list[BadShard]]] = {}

    def prepare(self, first: int, last: int) -> None:
        """Start to fetch and check the shards of the steps from `first` up to, not including, `last`."""
        self._prepared[first, last] = self._planner.submit(self._check_steps, first, last)

    def find_bad(self, first: int, last: int) -> list[BadShard]:
        """Return the damaged shards that the steps would read; [] if all their shards are available and intact.

        Raises:
            UserError: the cache has no space for a shard.
        """
        prepared = self._prepared.pop((first, last), None)
        return prepared.result() if prepared else self._check_steps(first, last)

    def allow(self, last: int) -> None:
        """Allow `batches` to read the steps before `last`."""
        with self._may_read:
            self._allowed = last
            self._may_read.notify_all()

    def batches(self) -> Iterator[np.ndarray]:
        """Yield the micro-batches of all steps, int32 (micro_batch, seq_len + 1), as soon as they may be read.

        Filler is marked (`data/filler.py`); `training.device_batches.ids_and_labels` makes inputs and labels of it.
        A step consists of the same rows of the order (`Order.at`) under every layout.
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
                yield self._read(Rows(*(column[start : start + self._micro_batch] for column in rows)))

    def close(self) -> None:
        """Cancel pending reads and fetches."""
        with self._may_read:
            self._closed.set()
            self._may_read.notify_all()
        for pool in (self._planner, self._pool):
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, rows: Rows) -> np.ndarray:
        try:
            return self._data.read(rows)
        except BadFile as error:
            raise UserError(
                f"{error}; rows already read from it may be damaged: resume the run, which replaces the shard"
            ) from None

    def _check_steps(self, first: int, last: int) -> list[BadShard]:
        needed: set[tuple[int, int]] = set()
        for step in range(first, last):
            rows = self._data.order.at(step, *self._share)
            for index in np.unique(rows.source).tolist():
                shards, _ = self._data.source(index).geometry.locate(rows.row[rows.source == index])
                needed |= {(index, shard) for shard in np.unique(shards).tolist()}
        checks = [self._pool.submit(self._check, first, *shard) for shard in sorted(needed)]
        return [bad for check in checks if (bad := check.result())]

    def _check(self, step: int, index: int, shard: int) -> BadShard | None:
        source = self._data.source(index)
        try:
            source.check(shard)
        except BadFile as error:
            return BadShard(step, self._data.order.names[index], shard, str(error), source.offset_of(shard, error))
        return None


def _check_epochs(run: RunConfig, order: Order) -> None:
    """Check the epochs stated in the run file against the rows that its steps read."""
    consumed = order.consumed(run.training.steps)
    for source in run.data.sources:
        rows, epochs = consumed[source.name]
        if source.epochs is None or abs(epochs - source.epochs) <= EPOCH_TOLERANCE * source.epochs:
            continue
        raise UserError(
            f"data.sources: {source.name} states epochs = {source.epochs:g}, but {rows} of the run's "
            f"{order.batches.first_row(run.training.steps)} rows, from the shards of {source.path}, "
            f"are {epochs:.3g}; set epochs to {epochs:.3g}, or change the weight, the steps or the source"
        )


def _ledger(bad: list[BadShard]) -> str:
    return "; ".join(f"step {b.step}, {b.source}, shard {b.shard}: {b.reason}" for b in bad)
