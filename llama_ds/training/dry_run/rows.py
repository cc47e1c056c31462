"""Check that data-parallel ranks read disjoint rows. The data order is computed, so the data need not be present."""

from __future__ import annotations

import os

import numpy as np

from llama_ds.config.batch_stages import batches_of
from llama_ds.config.row_stages import SEQ_LEN
from llama_ds.config.schema import RunConfig
from llama_ds.data.mixture import planned
from llama_ds.data.order import Order, Rows
from llama_ds.data.source.manifest import Extent, Split
from llama_ds.data.stream import open_data
from llama_ds.layout.layout import Layout
from llama_ds.training.dry_run.report import Check

MAX_RANKS = 256  # rows of at most this many data-parallel ranks are compared
ROWS_PER_SHARD = 8192  # assumption for sources that are not on this machine


def check_rows(run: RunConfig, layout: Layout, first: int = 0) -> Check:
    """Check that each row of the step `first` of the run, or of its stage, is read by exactly one data-parallel rank.

    Raises:
        UserError: data on this machine cannot be used.
    """
    folders = [source.path.replace(SEQ_LEN, str(run.data.seq_len)) for source in run.data.sources]
    here = all(os.path.isdir(folder) for folder in folders)
    order = open_data(run, step=first).order if here else _order_of_stated_sizes(run)
    some = sorted({round(i) for i in np.linspace(0, layout.dp - 1, min(layout.dp, MAX_RANKS))})
    check = compare_rows([(rank, order.at(first, rank, layout.dp)) for rank in some], layout.global_batch // layout.dp)
    sizes = "actual sources" if here else "sources are not on this machine: sizes estimated from data.sources"
    return Check(check.name, check.ok, f"{check.text} ({sizes})")


def compare_rows(read: list[tuple[int, Rows]], share: int) -> Check:
    """Check that each data-parallel rank reads `share` rows and that no two ranks read the same row."""
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
    return Check(
        name, len(owner) == share * len(read), f"{len(owner)} distinct rows read by {len(read)} data-parallel ranks"
    )


def _order_of_stated_sizes(run: RunConfig) -> Order:
    """Return the data order for sources whose sizes follow from their weights and epochs."""
    geometry = {}
    for source in run.data.sources:
        rows = run.training.tokens / run.data.seq_len * source.weight / (source.epochs or 1.0)
        count = max(1, int(rows))
        extent = Extent(rows=count, documents=count, ids=count * run.data.seq_len)
        geometry[source.name] = Split(rows_per_shard=min(ROWS_PER_SHARD, count), extents=(extent,))
    batches = batches_of(run.training)
    return planned(run.data, batches, geometry).order(run.seed, batches)
