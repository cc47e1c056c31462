"""A rank's micro-batches: read once per host, compared between ranks, and copied to the device ahead of time.

Ranks agree on two things, every `data.check_interval` steps and before the first:

- The data is the same. The first and the last stage, and all tensor-parallel ranks, of a data-parallel rank must read
  the same batches; all ranks must have the same data order. Checksums of both are compared.
- The damaged shards are known. Steps form periods of check_interval. By the middle of a period every reading rank has
  fetched and checked its shards of the next one. From the next period on, all ranks replace the shards that any rank
  found damaged.

This costs one gather of a few integers. Nothing else blocks, and no rank reads beyond the agreed steps.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from llama_ds.config.schema import RunConfig
from llama_ds.data.mixture import STATE, save_state
from llama_ds.data.order import BadShard
from llama_ds.data.read_ahead import ReadAhead
from llama_ds.data.stream import Dataset, Reader
from llama_ds.errors import UserError, first_of
from llama_ds.layout.layout import Layout
from llama_ds.log import logger
from llama_ds.parallel import world
from llama_ds.parallel.sharing import Neighbours, find_neighbours, share
from llama_ds.training.cp_balance import balance_of
from llama_ds.training.device_batches import MicroBatch, on_device, row_share
from llama_ds.training.engines.interface import Engine

INTACT, DAMAGED, FAILED = range(3)  # status of the shards that a rank needs next
MOST_NAMED = 16  # ranks of a group that a message names


class Feed:
    """The micro-batches of a rank, step after step."""

    def __init__(
        self,
        run: RunConfig,
        layout: Layout,
        data: Dataset,
        steps: range,
        engine: Engine,
        rank_info: world.RankInfo,
        device: torch.device,
    ) -> None:
        """Agree with the other ranks on the first steps and start reading. Collective.

        Raises:
            UserError: ranks read different data, or more shards are damaged than the run file allows.
        """
        self._run, self._layout, self._data, self._steps = run, layout, data, steps
        self._engine, self._rank_info, self._device = engine, rank_info, device
        self._interval = run.data.check_interval
        self.balance = balance_of(run, data.sources.tokenizer.marks)
        self._crc_of: dict[int, int] = {}  # checksums of the steps read since the last comparison
        self._batches: Iterator[Any] = itertools.repeat(np.empty(0))
        self._shared: Iterator[np.ndarray] = iter(())
        self._ahead: ReadAhead[Any] | None = None
        self._reader: Reader | None = None
        neighbours = find_neighbours(engine.reads_data, engine.dp_rank)
        if engine.reads_data and neighbours.reads:
            self._reader = Reader(data, steps, engine.dp_rank, layout.dp, layout.micro_batch, allowed=steps.start)
        world.together(self._save_state)
        self._agree(steps.start, self._period_end(steps.start))
        if steps.start % self._interval > self._interval // 2:  # the agreement on the next period would be overdue
            self._agree(self._period_end(steps.start), self._period_end(steps.start) + self._interval)
        if engine.reads_data:
            self._read(neighbours)
        self._compare(steps.start + 1, INTACT)

    @property
    def wait_s(self) -> float:
        """Total seconds for which this rank has waited for data."""
        return self._ahead.wait_s if self._ahead else 0.0

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def before_step(self, step: int) -> None:
        """In the middle of a period, agree on the next one. Collective.

        Raises:
            UserError: see the constructor.
        """
        if step % self._interval == self._interval // 2:
            self._agree(self._period_end(step), self._period_end(step) + self._interval, done=step)

    def close(self) -> None:
        """Stop the reader threads: one still running at interpreter exit would abort the process. Collective."""
        self._end_threads()
        for _ in self._shared:  # if a run ends early, drain until all neighbours know it
            pass

    def abandon(self) -> None:
        """End the reader threads, whose connections are broken, and drop what they read."""
        self._end_threads()
        self._ahead, self._batches, self._shared = None, iter(()), iter(())  # they refer to this object

    def _end_threads(self) -> None:
        if self._reader:
            self._reader.close()
        if self._ahead:
            self._ahead.close()

    def _period_end(self, step: int) -> int:
        return (step // self._interval + 1) * self._interval

    def _read(self, neighbours: Neighbours) -> None:
        shape = (self._layout.micro_batch, self._run.data.seq_len + 1)
        accumulation = self._layout.accumulation
        own = self._reader.batches() if self._reader else None
        self._shared = share(own, len(self._steps) * accumulation, shape, neighbours)
        summed = self._summed(self._shared)
        # The last stage draws a micro-batch up to a full step after the first. If one reader feeds both, a shorter
        # read-ahead could starve one of them.
        needed = row_share(self._engine.context, self._run.data.seq_len) if self._layout.cp > 1 else None
        self._ahead = ReadAhead(on_device(summed, self._device, needed), depth=accumulation + 2)
        first_step = list(itertools.islice(self._ahead, accumulation))
        self._batches = itertools.chain(first_step, self._ahead)

    def _summed(self, batches: Iterator[np.ndarray]) -> Iterator[MicroBatch]:
        """Yield the batches with their number of labels, and record a checksum of every step."""
        micro_batches = self._layout.accumulation * self._layout.dp
        for step in self._steps:
            crc, labels = 0, 0.0
            for _ in range(self._layout.accumulation):
                batch = next(batches, None)
                if batch is None:  # the run ends before its last step
                    return
                # The rank that read the batch was allowed to, so all ranks know the damaged shards of this step.
                labels = labels or self._data.labels(step) / micro_batches
                crc = zlib.crc32(batch.data, crc)
                self._crc_of[step] = crc
                if self.balance:
                    self.balance.add(step, batch)
                yield MicroBatch(batch, labels)

    def _agree(self, first: int, last: int, done: int = 0) -> None:
        """Agree on the shards of steps `first` to `last` and allow reading them; compare the steps before `done`."""
        first, last = min(first, self._steps.stop), min(last, self._steps.stop)
        while True:
            status, bad, error = self._inspect_shards(first, last)
            statuses = self._compare(done, status)
            if FAILED in statuses:
                world.together(lambda error=error: _raise(error))  # type: ignore[misc]
            if DAMAGED not in statuses:
                break
            # The sort is stable: if several ranks report a shard, all ranks use the first report.
            found = sorted(itertools.chain(*world.gather(bad)), key=_shard)
            self._replace([next(group) for _, group in itertools.groupby(found, key=_shard)])
        if self._reader:
            self._reader.allow(last)
            self._reader.prepare(last, min(last + self._interval, self._steps.stop))

    def _inspect_shards(self, first: int, last: int) -> tuple[int, list[BadShard], UserError | None]:
        """Return the status of the shards that this rank will read, the damaged shards, and the error if any."""
        try:
            bad = self._reader.find_bad(first, last) if self._reader else []
            return (DAMAGED if bad else INTACT), bad, None
        except UserError as error:
            return FAILED, [], error

    def _replace(self, found: list[BadShard]) -> None:
        for bad in found:
            logger.warning(
                "data: shard %d of source %s is damaged and will be replaced from step %d on: %s",
                bad.shard, bad.source, bad.step, bad.reason,
            )  # fmt: skip
        self._data.replace(found, self._run.data.max_bad_shards)  # raises on all ranks alike if there are too many
        world.together(self._save_state)

    def _compare(self, done: int, status: int) -> set[int]:
        """Compare the checksums of the steps before `done`; return the statuses of all ranks. Collective."""
        crc = 0
        for step in sorted(step for step in list(self._crc_of) if step < done):  # copied: a thread adds to the dict
            crc = zlib.crc32(self._crc_of.pop(step).to_bytes(4, "little"), crc)
        own = [int(self._engine.reads_data), self._engine.dp_rank, crc, self._data.fingerprint, status]
        ranks = world.gather_numbers(own, self._device)
        reads, dp_rank, crcs, fingerprints, statuses = ranks.T
        _check_same("have a different data order (source, seed or history)", fingerprints, np.arange(len(ranks)), done)
        for number in np.unique(dp_rank[reads == 1]):
            readers = np.flatnonzero((reads == 1) & (dp_rank == number))
            _check_same(f"of data-parallel rank {number} read different batches", crcs[readers], readers, done)
        return set(statuses.tolist())

    def _save_state(self) -> None:
        if self._rank_info.rank == 0:
            try:
                save_state(os.path.join(self._run.run_dir, STATE), self._data.state)
            except OSError as error:
                raise UserError(
                    f"{self._run.run_dir}: cannot write {STATE} ({error}); set output_dir to a writable folder"
                ) from None


def _check_same(what: str, values: np.ndarray, ranks: np.ndarray, step: int) -> None:
    if len(kinds := np.unique(values)) > 1:
        groups = sorted((ranks[values == kind] for kind in kinds), key=lambda group: (-len(group), group[0]))
        shown = " | ".join(first_of(group.tolist(), MOST_NAMED) for group in groups)
        raise UserError(
            f"step {step}: ranks {shown} {what}; further training would mix different rows: compare the sources' "
            "folders and the code on the hosts of these ranks, then resume"
        )


def _shard(bad: BadShard) -> tuple[str, int]:
    return bad.source, bad.shard


def _raise(error: UserError | None) -> None:
    if error:
        raise error
