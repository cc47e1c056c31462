"""Audit of a run from its folder: the documents that a step reads, and the consumption of each source."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llama_ds.config.batch_stages import batches_of
from llama_ds.config.row_stages import at_stage, length_begins
from llama_ds.config.run_file import load_resolved
from llama_ds.config.schema import RunConfig
from llama_ds.data.mixture import STATE, DataState, check_same_sources, planned, state_from_json
from llama_ds.data.order import Order
from llama_ds.data.source.documents_index import IndexedDocument
from llama_ds.data.source.manifest import shard_name
from llama_ds.data.sources import open_sources
from llama_ds.errors import UserError


@dataclass(frozen=True)
class ReadDocument:
    """The part of a document that lies in a row."""

    place: str  # file, or file:line, of the document
    digest: str  # first half of the sha256 of its text, in hex
    first: int  # first id of the document in the row, with bos as id 0
    last: int  # last id, inclusive
    length: int  # number of ids in the whole document


@dataclass(frozen=True)
class ReadRow:
    """A row that a step reads."""

    source: str
    epoch: int
    shard: str
    row: int  # row number in the shard
    documents: tuple[ReadDocument, ...]


class RecordedRun(NamedTuple):
    """A run as its folder describes it."""

    config: RunConfig
    state: DataState
    path: str  # file of the state, for messages

    @property
    def order(self) -> Order:
        """The order in which the run reads its rows."""
        return self.state.order(self.config.seed, batches_of(self.config.training))

    def consumed(self, step: int) -> dict[str, tuple[int, float]]:
        """Return the (rows, epochs) of each source that the steps before `step` have read.

        With `data.stages`, these are the rows of the present length.

        Raises:
            UserError: the last of these steps reads rows of another length.
        """
        if step == 0:
            return self.order.consumed(0)
        self.check_length(step - 1)
        begun, read = self.order.consumed(length_begins(self.config, step - 1)), self.order.consumed(step)
        return {name: (rows - begun[name][0], epochs - begun[name][1]) for name, (rows, epochs) in read.items()}

    def check_length(self, step: int) -> None:
        """Raise UserError if `step` reads rows of another length than those that the state describes."""
        own, seq_len = self.config.data.seq_len, at_stage(self.config, step).data.seq_len
        if seq_len != own:
            raise UserError(
                f"{self.path}: describes the rows of {own} tokens that the run has read last, and step {step} is of a "
                f"stage with rows of {seq_len}; ask for a step with rows of {own}"
            )


def open_run(folder: str) -> RecordedRun:
    """Return the run in `folder`.

    Raises:
        UserError: the folder is not a run folder, or another version wrote it.
    """
    path = os.path.join(folder, STATE)
    try:
        with open(path, encoding="utf-8") as file:
            state = state_from_json(json.load(file), path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name the folder of a run, as in runs/quickstart") from None
    return RecordedRun(load_resolved(os.path.join(folder, "run.yaml")), state, path)


def documents_of_step(recorded: RecordedRun, step: int) -> list[ReadRow]:
    """Return the rows, with their documents, that `step` (counted from 0) reads, in data-parallel rank order.

    Raises:
        UserError: the run has no such step, or a source is not available or was rebuilt since.
    """
    run, order = recorded.config, recorded.order
    if not 0 <= step < run.training.steps:
        raise UserError(f"step {step} is not one of the run's steps 0 to {run.training.steps - 1}")
    recorded.check_length(step)
    opened = open_sources(run.data, run.model.vocab_size)
    sources = {config.name: source for config, source in zip(run.data.sources, opened.train, strict=True)}
    rows = order.at(step)
    geometry = {name: source.geometry for name, source in sources.items()}
    present = planned(run.data, order.batches, geometry)
    segments = [segment for segment in recorded.state.segments if segment.step <= step]
    check_same_sources({order.names[i] for i in rows.source.tolist()}, segments, recorded.state, present, recorded.path)
    indexes: dict[tuple[str, int], list[IndexedDocument]] = {}
    found = []
    for source_index, epoch, row in zip(*(column.tolist() for column in rows), strict=True):
        name = order.names[source_index]
        if name not in sources:
            raise UserError(f"step {step} read source {name}, which the run file no longer names; add it again")
        source = sources[name]
        (shard,), (shard_row,) = (part.tolist() for part in source.geometry.locate(np.array([row])))
        if (name, shard) not in indexes:
            indexes[name, shard] = source.documents(shard)
        parts = _parts(indexes[name, shard], shard_row * source.seq_len, (shard_row + 1) * source.seq_len)
        found.append(ReadRow(name, epoch, shard_name("train", shard), shard_row, parts))
    return found


def _parts(documents: list[IndexedDocument], first: int, last: int) -> tuple[ReadDocument, ...]:
    """Return the documents at the positions `first` to `last` (inclusive) of a shard."""
    return tuple(
        ReadDocument(d.place, d.digest.hex(), max(0, first - d.start), min(d.length - 1, last - d.start), d.length)
        for d in documents
        if d.start <= last and d.start + d.length > first
    )
