"""Which documents a step of a run reads, and what a run has read of each source: from its folder alone."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import numpy as np

from llama_ds.config.run_file import load_resolved
from llama_ds.config.schema import RunConfig
from llama_ds.data.mixture import STATE, state_from_json
from llama_ds.data.order import Order
from llama_ds.data.source.documents_index import IndexedDocument, parse_documents
from llama_ds.data.source.manifest import documents_name, shard_name
from llama_ds.data.source.shards import Source
from llama_ds.data.source.store import BadFile
from llama_ds.data.sources import open_sources
from llama_ds.errors import UserError


@dataclass(frozen=True)
class ReadDocument:
    """A part of a document that stands in a row."""

    place: str  # file, or file:line
    digest: str  # first half of the sha256 of its text, in hex
    first: int  # of its ids, bos counted as 0
    last: int
    length: int  # of all its ids


@dataclass(frozen=True)
class ReadRow:
    """A row that a step reads."""

    source: str
    epoch: int
    shard: str
    row: int  # in the shard
    documents: tuple[ReadDocument, ...]


def open_run(folder: str) -> tuple[RunConfig, Order]:
    """Return the run in `folder` and the order in which it reads.

    Raises:
        UserError: the folder is not that of a run, or of another version.
    """
    place = os.path.join(folder, STATE)
    try:
        with open(place, encoding="utf-8") as file:
            state = state_from_json(json.load(file), place)
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: cannot be read ({error}); name the folder of a run, as in runs/quickstart") from None
    run = load_resolved(os.path.join(folder, "run.yaml"))
    return run, state.order(run.seed, run.training.global_batch)


def documents_of_step(run: RunConfig, order: Order, step: int) -> list[ReadRow]:
    """Return the rows that `step`, counted from 0, reads, as data-parallel ranks share them out, with their documents.

    Raises:
        UserError: the run has no such step, or a source is not at hand.
    """
    if not 0 <= step < run.training.steps:
        raise UserError(f"step {step} is not one of the run's steps 0 to {run.training.steps - 1}")
    opened = open_sources(run.data, run.model.vocab_size)
    sources = {config.name: source for config, source in zip(run.data.sources, opened.train, strict=True)}
    indexes: dict[tuple[str, int], list[IndexedDocument]] = {}
    found = []
    for number, epoch, row in zip(*(column.tolist() for column in order.at(step)), strict=True):
        name = order.names[number]
        if name not in sources:
            raise UserError(f"step {step} read source {name}, which the run file does not name any more")
        source = sources[name]
        (shard,), (inside,) = (part.tolist() for part in source.geometry.locate(np.array([row])))
        if (name, shard) not in indexes:
            indexes[name, shard] = _documents(source, shard)
        parts = _parts(indexes[name, shard], inside * source.seq_len, (inside + 1) * source.seq_len)
        found.append(ReadRow(name, epoch, shard_name("train", shard), inside, parts))
    return found


def _documents(source: Source, shard: int) -> list[IndexedDocument]:
    name = documents_name(source.split, shard)
    try:
        return parse_documents(source.store.read(name), f"{source.store.place}/{name}")
    except BadFile as error:
        raise UserError(f"{error}; copy the source's folder index/ too") from None


def _parts(documents: list[IndexedDocument], first: int, last: int) -> tuple[ReadDocument, ...]:
    """Return what stands at the positions `first` to `last` of a shard."""
    return tuple(
        ReadDocument(d.place, d.digest.hex(), max(0, first - d.start), min(d.length - 1, last - d.start), d.length)
        for d in documents
        if d.start <= last and d.start + d.length > first
    )
