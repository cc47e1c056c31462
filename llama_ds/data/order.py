"""The order of rows: arithmetic from (seed, mixture history, step) to (source, epoch, row).

The rows of a run are numbered 0, 1, ...: step s reads the rows s * global_batch .. (s + 1) * global_batch, or, where
batches grow, those after the rows of step s - 1 (`config/batch_stages.py`). There is no
state from row to row, so a run resumed at step 300,000, on any number of ranks, reads the same rows as without a stop.

The order has three levels, each a pure function of the level above it:

    run      every block of rows matches the weights to within one row per source; sources are shuffled in a block
    source   the n-th row of a source: every epoch shuffles its shards and reads each row once
    window   WINDOW shards are open at a time and their rows are shuffled together

A history is a list of segments: from a step on, weights change or sources grow by extents. The new shards of a source
join the epoch in progress: windows that have started are finished, and the remaining shards are shuffled with the new
ones. A segment never changes the steps before it.

If a run skips rows (`skips.py`), the levels order a stream, and the run reads it without the skipped windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from llama_ds.config.batch_stages import Batches
from llama_ds.data.skips import Skip, Skips
from llama_ds.errors import UserError

MIN_BLOCK = 1024  # rows per block, in which the mixture matches the weights to within one row per source
MAX_BLOCK = 1 << 26  # rows of a block at most; its shuffle takes about 2 GB of memory, and seconds
WINDOW = 8  # shards shuffled together; limits the number of open files
WEIGHT_ONE = 1 << 40  # fixed-point weight of 1, so that arithmetic is exact at any row number


@dataclass(frozen=True)
class Segment:
    """The mixture from `step` on. A source that a segment does not name is not read in it."""

    step: int
    weights: dict[str, float]  # relative to their sum; 0: the source is known but not read
    extents: dict[str, tuple[int, ...]]  # rows of each extent, for each source of the segment


@dataclass(frozen=True)
class BadShard:
    """A shard whose rows are replaced, from `step` on, by rows of the next intact shard."""

    step: int
    source: str
    shard: int
    reason: str = ""
    offset: int | None = None  # byte offset of the damage in the shard, if known


class Rows(NamedTuple):
    """Rows of a run, as arrays of one length."""

    source: np.ndarray  # index into `Order.names`
    epoch: np.ndarray
    row: np.ndarray  # row number in the source


def permutation(n: int, *key: object) -> np.ndarray:
    """Return a permutation of range(n) that depends on `key` alone, on every machine and numpy version.

    It sorts raw Philox words: numpy keeps the stream of a bit generator stable, but not Generator.permutation (NEP 19).
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return np.argsort(words, kind="stable")


class Order:
    """The order in which a run reads its sources.

    rows_per_shard: by source name. segments: in order of steps, the first at step 0. bad: shards to replace;
    `replace_shards` adds more. skips: in order of steps. Public methods count steps of the run, private ones rows of
    the stream.
    """

    def __init__(
        self,
        seed: int,
        batches: Batches | int,
        rows_per_shard: Mapping[str, int],
        segments: Sequence[Segment],
        bad: Sequence[BadShard] = (),
        skips: Sequence[Skip] = (),
    ) -> None:
        """`batches`: the rows of each step, or of every step."""
        if not segments or segments[0].step or any(b.step <= a.step for a, b in pairwise(segments)):
            raise ValueError("segments must start at step 0 and be in ascending order of steps")
        self.seed, self.batches = int(seed), Batches((batches,)) if isinstance(batches, int) else batches
        self.names = tuple(rows_per_shard)
        self._rows_per_shard = dict(rows_per_shard)
        self.skips = Skips(skips, self.batches)
        self._mixes: list[_Mix] = []
        starts = [self.skips.end(segment.step) for segment in segments]
        counts = [0] * len(self.names)
        for i, segment in enumerate(segments):
            self._mixes.append(_Mix(self.seed, i, self.names, segment, starts[i], counts))
            if i + 1 < len(segments):
                counts = self._mixes[-1].counts(starts[i + 1] - starts[i])
        self._sources = [SourceOrder(self.seed, name, rows_per_shard[name]) for name in self.names]
        for mix in self._mixes:
            for source, name in enumerate(self.names):
                if mix.segment.extents.get(name):
                    self._sources[source].grow(mix.base[source], mix.segment.extents[name])
        self.bad = list(bad)

    def replace_shards(self, bad: Sequence[BadShard]) -> None:
        """Replace more shards, from steps on that no rank has read yet."""
        self.bad = [*self.bad, *bad]  # a new list, because another thread may be iterating over the old one

    def at(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> Rows:
        """Return the rows that one data-parallel rank reads in `step`: the dp_rank-th of dp_size equal shares.

        The rows of a step are sorted by shard before they are divided, so a rank reads few files sequentially, and the
        same files throughout a window. The loss of a step, a mean over its rows, does not depend on dp.
        """
        rows = self.rows_of(step)
        share = self.batches.of(step) // dp_size
        mine = np.lexsort((rows.row, rows.source))[dp_rank * share : (dp_rank + 1) * share]
        return Rows(*(column[mine] for column in rows))

    def rows_of(self, step: int) -> Rows:
        """Return the rows of a step in the order of the run."""
        return self.rows(self.batches.first_row(step), self.batches.of(step))

    def rows(self, start: int, count: int) -> Rows:
        """Return the rows number start .. start + count of the run, also beyond its last step."""
        skip_rows = (self.batches.first_row(skip.step) for skip in self.skips.all)
        cuts = [start, *(row for row in skip_rows if start < row < start + count), start + count]
        parts = [self._rows(self.skips.position(first), last - first) for first, last in pairwise(cuts)]
        return Rows(*map(np.concatenate, zip(*parts, strict=True)))

    def _first_row(self, step: int) -> int:
        """Return the row of the stream that is the first of `step`."""
        return self.skips.position(self.batches.first_row(step))

    def _rows(self, start: int, count: int) -> Rows:
        out = Rows(*(np.empty(count, np.int64) for _ in Rows._fields))
        for mix, first, last in self._spans(start, start + count):
            labels, counts = mix.labels(first, last)
            span = slice(first - start, last - start)
            out.source[span] = labels
            for source in np.unique(labels):
                positions = np.flatnonzero(labels == source) + span.start
                found = self._sources[source].rows(counts[source], counts[source] + len(positions))
                out.epoch[positions], out.row[positions] = found
        self._replace(out, start)
        return out

    def consumed(self, step: int) -> dict[str, tuple[int, float]]:
        """Return the (rows, epochs) of each source that the steps before `step` have read.

        Skipped rows are not read: they count neither as rows nor as parts of an epoch.
        """
        read = self._before(self.skips.end(step))
        for first, last in self.skips.windows(step):
            for source, (begin, end) in enumerate(zip(self._before(first), self._before(last), strict=True)):
                read[source] = (read[source][0] - (end[0] - begin[0]), read[source][1] - (end[1] - begin[1]))
        return dict(zip(self.names, read, strict=True))

    def _before(self, row: int) -> list[tuple[int, float]]:
        """Return the (rows, epochs) of each source before `row` of the stream."""
        mix = self._mix_at(row)
        counts = mix.counts(row - mix.start)
        return [(count, source.epochs(count)) for count, source in zip(counts, self._sources, strict=True)]

    def shards_of(self, step: int) -> dict[str, int]:
        """Return the number of shards of each source in the segment of `step`."""
        extents = self._mix_at(self._first_row(step)).segment.extents
        return {name: len(_shard_sizes(extents[name], self._rows_per_shard[name])) for name in extents}

    def _mix_at(self, row: int) -> _Mix:
        return next(mix for mix in reversed(self._mixes) if mix.start <= row)

    def _spans(self, start: int, stop: int) -> Iterator[tuple[_Mix, int, int]]:
        ends = [*(mix.start for mix in self._mixes[1:]), stop]
        for mix, end in zip(self._mixes, ends, strict=True):
            first, last = max(start, mix.start), min(stop, end)
            if first < last:
                yield mix, first, last

    def _replace(self, rows: Rows, start: int) -> None:
        since = {bad: self._first_row(bad.step) for bad in self.bad}
        if not any(row < start + len(rows.row) for row in since.values()):
            return
        for source, name in enumerate(self.names):
            bad = [b for b in since if b.source == name]  # not self.bad, which another thread may have replaced
            for i in np.flatnonzero(rows.source == source) if bad else ():
                extents = self._mix_at(start + i).segment.extents[name]
                bad_now = {b.shard for b in bad if since[b] <= start + i}
                rows.row[i] = _intact(int(rows.row[i]), extents, self._rows_per_shard[name], bad_now)


class _Mix:
    """One segment: the source of each of its rows, and the rows of each source read before, over all segments."""

    def __init__(
        self, seed: int, number: int, names: Sequence[str], segment: Segment, start: int, base: list[int]
    ) -> None:
        self.segment, self.start, self.base = segment, start, base
        weights = [segment.weights.get(name, 0.0) for name in names]
        if min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"weights {weights} of a mixture must not be negative, and at least one must be positive")
        if any(w > 0 and not sum(segment.extents.get(name, ())) for name, w in zip(names, weights, strict=True)):
            raise ValueError("every source with a positive weight needs at least one row")
        self._key = (seed, "mixture", number)
        self._edges = [0, *(round(w / sum(weights) * WEIGHT_ONE) for w in accumulate(weights))]
        self._edges[-1] = WEIGHT_ONE
        # Each source needs two rows per block or more; otherwise its rounded count could decrease from block to block.
        smallest = min(b - a for (a, b), w in zip(pairwise(self._edges), weights, strict=True) if w > 0 or b > a)
        self.block = max(MIN_BLOCK, 1 << (2 * WEIGHT_ONE // max(1, smallest)).bit_length())
        if self.block > MAX_BLOCK:
            weight, name = min((w, name) for w, name in zip(weights, names, strict=True) if w > 0)
            raise UserError(
                f"weight {weight:g} of source {name} is {weight / sum(weights):.1e} of the mixture from step "
                f"{segment.step} on, less than one row in {MAX_BLOCK // 2:,}; raise it, or set it to 0 to leave the "
                "source out"
            )
        self._mixed = lru_cache(maxsize=4)(self._mix_block)

    def counts(self, rows: int) -> list[int]:
        """Return the total rows read of each source after `rows` rows of this segment."""
        block, inside = divmod(rows, self.block)
        more = np.bincount(self._mixed(block)[:inside], minlength=len(self.base))
        return [before + int(m) for before, m in zip(self._counts(block), more, strict=True)]

    def labels(self, first: int, last: int) -> tuple[np.ndarray, list[int]]:
        """Return the source of each stream row from `first` to `last`, and the rows of each source read before."""
        parts, at = [], first - self.start
        while at < last - self.start:
            block, inside = divmod(at, self.block)
            parts.append(self._mixed(block)[inside : inside + last - self.start - at])
            at += len(parts[-1])
        return np.concatenate(parts), self.counts(first - self.start)

    def _counts(self, block: int) -> list[int]:
        # Differences of rounded cumulative weights add up exactly.
        rows = block * self.block
        edges = [(rows * edge + WEIGHT_ONE // 2) // WEIGHT_ONE for edge in self._edges]
        return [base + b - a for base, (a, b) in zip(self.base, pairwise(edges), strict=True)]

    def _mix_block(self, block: int) -> np.ndarray:
        sizes = [b - a for a, b in zip(self._counts(block), self._counts(block + 1), strict=True)]
        return np.repeat(np.arange(len(sizes)), sizes)[permutation(self.block, *self._key, block)]


@dataclass(frozen=True)
class _Span:
    """Epochs of one source from its row `start` on: either identical epochs, or one epoch during which it grew."""

    start: int  # rows of the source before the span
    epoch: int
    extents: tuple[int, ...]  # extents at the start of the epoch
    growth: tuple[tuple[int, tuple[int, ...]], ...] = ()  # (rows read of the epoch, extents from there on)

    @property
    def length(self) -> int:
        """Number of rows per epoch."""
        return sum(self.growth[-1][1] if self.growth else self.extents)


class SourceOrder:
    """The order of one source: every epoch shuffles the shards, then the rows of WINDOW shards at a time."""

    def __init__(self, seed: int, name: str, rows_per_shard: int) -> None:
        self._key = (seed, name)
        self._rows_per_shard = rows_per_shard
        self._spans: list[_Span] = []
        self._epoch = lru_cache(maxsize=4)(self._shuffle_shards)
        self._window = lru_cache(maxsize=4)(self._shuffle_window)

    def grow(self, n: int, extents: tuple[int, ...]) -> None:
        """Set the extents of the source from its n-th row on."""
        if not self._spans:
            self._spans = [_Span(n, 0, extents)]
            return
        known = self._spans[-1].extents if not self._spans[-1].growth else self._spans[-1].growth[-1][1]
        if extents == known:
            return
        if extents[: len(known)] != known:
            raise ValueError(f"source {self._key[1]}: extents {extents} must begin with {known}")
        span = self._span_at(n)
        epochs = (n - span.start) // span.length
        start, epoch = span.start + epochs * span.length, span.epoch + epochs
        self._spans = [s for s in self._spans if s.start < start]
        if n == start:
            self._spans.append(_Span(start, epoch, extents))
            return
        grown = _Span(start, epoch, span.extents, (*span.growth, (n - start, extents)))
        self._spans += [grown, _Span(start + grown.length, epoch + 1, extents)]

    def epochs(self, n: int) -> float:
        """Return the number of epochs in the first `n` rows."""
        if not self._spans or n <= self._spans[0].start:
            return 0.0
        span = self._span_at(n)
        return span.epoch + (n - span.start) / span.length

    def rows(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the (epochs, row numbers) of the source's reads from number `first` up to, not including, `last`."""
        epochs, rows = np.empty(last - first, np.int64), np.empty(last - first, np.int64)
        at = first
        while at < last:
            span = self._span_at(at)
            passed, inside = divmod(at - span.start, span.length)
            span = replace(span, start=span.start + passed * span.length, epoch=span.epoch + passed)
            _, _, starts = self._epoch(span)
            window = int(np.searchsorted(starts, inside, side="right")) - 1
            found = self._window(span, window)[inside - int(starts[window]) :][: last - at]
            here = slice(at - first, at - first + len(found))
            epochs[here], rows[here] = span.epoch, found
            at += len(found)
        return epochs, rows

    def _span_at(self, n: int) -> _Span:
        return next(span for span in reversed(self._spans) if span.start <= n)

    def _shuffle_shards(self, span: _Span) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the shards of an epoch in order, the window edges in that list, and the rows before each window."""
        shards = permutation(len(self._sizes(span.extents)), *self._key, "shards", span.epoch)
        edges = _edges(0, len(shards))
        starts = self._window_starts(shards, edges, span.extents)
        known = len(shards)
        for number, (read, extents) in enumerate(span.growth):
            started = int(np.searchsorted(starts, read, side="left"))
            kept = int(edges[started])
            rest = np.concatenate([shards[kept:], np.arange(known, len(self._sizes(extents)))])
            known = len(self._sizes(extents))
            rest = rest[permutation(len(rest), *self._key, "shards", span.epoch, number)]
            shards = np.concatenate([shards[:kept], rest])
            edges = np.concatenate([edges[:started], _edges(kept, len(shards))])
            starts = self._window_starts(shards, edges, extents)
        return shards, edges, starts

    def _window_starts(self, shards: np.ndarray, edges: np.ndarray, extents: tuple[int, ...]) -> np.ndarray:
        before = np.concatenate([[0], np.cumsum(self._sizes(extents)[shards])])
        return before[edges[:-1]]

    def _shuffle_window(self, span: _Span, window: int) -> np.ndarray:
        shards, edges, _ = self._epoch(span)
        extents = span.growth[-1][1] if span.growth else span.extents
        sizes = self._sizes(extents)
        first = _shard_ends(extents, self._rows_per_shard) - sizes
        chosen = shards[edges[window] : edges[window + 1]]
        rows = np.concatenate([first[s] + np.arange(sizes[s]) for s in chosen])
        return rows[permutation(len(rows), *self._key, "rows", span.epoch, window)]

    def _sizes(self, extents: tuple[int, ...]) -> np.ndarray:
        return _shard_sizes(extents, self._rows_per_shard)


def _edges(first: int, last: int) -> np.ndarray:
    return np.append(np.arange(first, last, WINDOW), last)


@lru_cache(maxsize=64)
def _shard_sizes(extents: tuple[int, ...], rows_per_shard: int) -> np.ndarray:
    """Return the rows of every shard: all shards of an extent but its last are full."""
    sizes = []
    for rows in extents:
        extent = np.full(-(-rows // rows_per_shard), rows_per_shard, np.int64)
        extent[-1:] -= len(extent) * rows_per_shard - rows
        sizes.append(extent)
    return np.concatenate([*sizes, np.empty(0, np.int64)])


@lru_cache(maxsize=64)
def _shard_ends(extents: tuple[int, ...], rows_per_shard: int) -> np.ndarray:
    """Return the cumulative number of rows at the end of every shard."""
    return np.cumsum(_shard_sizes(extents, rows_per_shard))


def _intact(row: int, extents: tuple[int, ...], rows_per_shard: int, bad: set[int]) -> int:
    """Return `row`, or, if its shard is bad, the row at the same offset in the next intact shard."""
    sizes, ends = _shard_sizes(extents, rows_per_shard), _shard_ends(extents, rows_per_shard)
    shard = int(np.searchsorted(ends, row, side="right"))
    if shard not in bad:
        return row
    inside = row - int(ends[shard] - sizes[shard])
    other = next(s % len(sizes) for s in range(shard + 1, shard + len(sizes)) if s % len(sizes) not in bad)
    return int(ends[other] - sizes[other]) + inside % int(sizes[other])
