"""Whether data-parallel ranks read different rows: the order of the data is arithmetic, for which no data is needed."""

from __future__ import annotations

import os

import numpy as np

from llama_ds.config.schema import RunConfig
from llama_ds.data.mixture import planned
from llama_ds.data.order import Order, Rows
from llama_ds.data.source.manifest import Extent, Split
from llama_ds.data.stream import open_data
from llama_ds.layout.layout import Layout
from llama_ds.training.dry_run.report import Check

MAX_RANKS = 256  # rows of at most this many data-parallel ranks are compared
ROWS_PER_SHARD = 8192  # assumed for sources that are not on this machine


def check_rows(run: RunConfig, layout: Layout) -> Check:
    """Return whether the rows of the run's first step are read by one data-parallel rank each, and all of them are.

    Raises:
        UserError: data that is here cannot be used.
    """
    here = all(os.path.isdir(source.path) for source in run.data.sources)
    order = open_data(run).order if here else _order_of_stated_sizes(run)
    some = sorted({round(i) for i in np.linspace(0, layout.dp - 1, min(layout.dp, MAX_RANKS))})
    check = compare_rows([(rank, order.at(0, rank, layout.dp)) for rank in some], layout.global_batch // layout.dp)
    whence = "sources as they are" if here else "sources are not here: of the sizes that data.sources states"
    return Check(check.name, check.ok, f"{check.text} ({whence})")


def compare_rows(read: list[tuple[int, Rows]], share: int) -> Check:
    """Return whether data-parallel ranks read `share` rows each and none that another reads."""
    name = "data rows"
    owner: dict[tuple[int, ...], int] = {}
    for rank, rows in read:
        if len(rows.row) != share:
            return Check(name, False, f"data-parallel rank {rank} reads {len(rows.row)} rows in a step, not {share}")
        for row in zip(*(column.tolist() for column in rows), strict=True):
            other = owner.setdefault(row, rank)
            if other != rank:
                source, epoch, number = row
                return Check(
                    name, False, f"data-parallel ranks {other} and {rank} both read row {number} of source {source} "
                    f"in epoch {epoch}",
                )  # fmt: skip
    return Check(name, len(owner) == share * len(read), f"{len(owner)} rows of {len(read)} data-parallel ranks differ")


def _order_of_stated_sizes(run: RunConfig) -> Order:
    """Return the order of sources as large as their weights and epochs say."""
    geometry = {}
    for source in run.data.sources:
        rows = run.training.tokens / run.data.seq_len * source.weight / (source.epochs or 1.0)
        count = max(1, int(rows))
        extent = Extent(rows=count, documents=count, ids=count * run.data.seq_len)
        geometry[source.name] = Split(rows_per_shard=min(ROWS_PER_SHARD, count), extents=(extent,))
    plan = planned(run.data, run.training.global_batch * run.data.seq_len, geometry)
    return plan.order(run.seed, run.training.global_batch)
