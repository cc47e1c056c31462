"""Building a source: documents -> ids -> packed rows -> webdataset tar shards and a manifest."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import BinaryIO

import numpy as np

from llama_ds.data.corpus import Document, documents
from llama_ds.data.packing import Packer, id_dtype
from llama_ds.data.shards import MANIFEST, Manifest, Shard, Split, member_name, write_manifest
from llama_ds.data.tokenizer import Tokenizer
from llama_ds.errors import UserError

BATCH_CHARS = 1 << 18  # characters per tokenization task: large against the cost of handing a task over
SPLITS = ("train", "validation")

Tokenized = list[tuple[bool, np.ndarray]]  # per document: for validation?, [bos] + ids + [eos]


def build_source(
    name: str,
    pattern: str,
    tokenizer_path: str,
    out: str,
    seq_len: int,
    validation_fraction: float = 0.01,
    rows_per_shard: int = 16384,
    workers: int = 1,
    document_chars: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda documents, ids: None,
) -> Manifest:
    """Tokenize and pack the documents of `pattern` into the folder out/name.

    A document goes to validation when the hash of its text says so: copies of one text go to one side, and more
    documents move none. The bytes written depend on the documents, the tokenizer and the sizes, not on `workers`.
    `progress` is called with the documents and ids of each batch.

    Raises:
        UserError: the source exists, the documents are bad (see `documents`), or they do not fill one row of a split.
    """
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise UserError(f"source name '{name}' is not a plain folder name; use letters, digits, '-' and '_'")
    if min(seq_len, rows_per_shard) < 1:
        raise UserError(f"seq_len = {seq_len} and rows per shard = {rows_per_shard} must both be 1 or more")
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation fraction {validation_fraction} is not in [0, 1); use for instance 0.01")
    tokenizer = Tokenizer(tokenizer_path)
    if tokenizer.bos_id < 0 or tokenizer.eos_id < 0:
        raise UserError(f"{tokenizer_path}: no bos or eos id; train one with tools/tokenizer.py train")
    folder = os.path.join(out, name)
    _clear(folder, overwrite)
    dtype = id_dtype(tokenizer.vocab_size)
    writers = {split: SplitWriter(folder, split, seq_len, dtype, rows_per_shard) for split in SPLITS}
    task = partial(_tokenize, tokenizer_path, validation_fraction)
    for batch in _map_in_order(task, _batches(documents(pattern, document_chars)), workers):
        for is_validation, ids in batch:
            writers[SPLITS[is_validation]].add(ids)
        progress(len(batch), sum(len(ids) for _, ids in batch))
    splits = {split: writer.close() for split, writer in writers.items()}
    _check_filled(pattern, splits, writers, validation_fraction)
    manifest = Manifest(name, seq_len, tokenizer.vocab_size, dtype.str, tokenizer.sha256, splits)
    write_manifest(folder, manifest)
    return manifest


class SplitWriter:
    """Packs documents into the shards folder/split-00000.tar, split-00001.tar, ..."""

    def __init__(self, folder: str, split: str, seq_len: int, dtype: np.dtype, rows_per_shard: int) -> None:
        self._folder, self._split = folder, split
        self._seq_len, self._dtype, self._rows_per_shard = seq_len, dtype, rows_per_shard
        self.packer = Packer(seq_len, dtype)
        self._shards: list[Shard] = []
        self._open: ShardWriter | None = None
        self._rows = self._documents = 0

    def add(self, ids: np.ndarray) -> None:
        """Append one document."""
        self._documents += 1
        for row in self.packer.add(ids):
            if self._open is None:
                self._open = ShardWriter(self._folder, f"{self._split}-{len(self._shards):05d}.tar", self._dtype)
            self._open.write(self._rows, row)
            self._rows += 1
            if self._open.rows == self._rows_per_shard:
                self._close_shard()

    def close(self) -> Split:
        """Finish the last shard and return what was written."""
        self._close_shard()
        return Split(self._rows, self._rows * self._seq_len, self._documents, tuple(self._shards))

    def _close_shard(self) -> None:
        if self._open is not None:
            self._shards.append(self._open.close())
            self._open = None


class ShardWriter:
    """One tar file written by webdataset's TarWriter with fixed times and owners: equal rows give equal bytes."""

    def __init__(self, folder: str, name: str, dtype: np.dtype) -> None:
        from webdataset import TarWriter  # here: it imports torch, which readers do without

        self.rows = 0
        self._name, self._dtype = name, dtype
        self._file = HashingFile(open(os.path.join(folder, name), "wb"))  # noqa: SIM115 (closed in close)
        self._tar = TarWriter(self._file, encoder=False, mtime=0, user="", group="")

    def write(self, index: int, row: np.ndarray) -> None:
        """Append `row` as the split's row `index`."""
        key, extension = member_name(index, self._dtype)
        self._tar.write({"__key__": key, extension: row.astype(self._dtype).tobytes()})
        self.rows += 1

    def close(self) -> Shard:
        """Finish the file and return its entry for the manifest."""
        self._tar.close()
        self._file.close()
        return Shard(self._name, self.rows, self._file.size, self._file.sha256.hexdigest())


class HashingFile:
    """A file to write to that keeps the size and the checksum of what went through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write `data`."""
        self.size += len(data)
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Hand what was written to the system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def in_validation(text: str, fraction: float) -> bool:
    """Whether the document belongs to validation, by its text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < fraction * 2**64


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer(path)  # once per worker process


def _tokenize(tokenizer_path: str, validation_fraction: float, texts: list[str]) -> Tokenized:
    tokenizer = _tokenizer(tokenizer_path)
    dtype, bos, eos = id_dtype(tokenizer.vocab_size), tokenizer.bos_id, tokenizer.eos_id
    ids = [np.array([bos, *tokenizer.encode(text), eos], dtype) for text in texts]
    return [(in_validation(text, validation_fraction), i) for text, i in zip(texts, ids, strict=True)]


def _batches(docs: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in docs:
        batch.append(document.text)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _map_in_order(
    task: Callable[[list[str]], Tokenized], batches: Iterator[list[str]], workers: int
) -> Iterator[Tokenized]:
    if workers <= 1:
        yield from map(task, batches)
        return
    # Not pool.map: it would read the whole corpus into memory before the first result is taken.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running: deque[Future[Tokenized]] = deque()
        for batch in batches:
            running.append(pool.submit(task, batch))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _clear(folder: str, overwrite: bool) -> None:
    manifest = os.path.join(folder, MANIFEST)
    if os.path.exists(manifest):
        if not overwrite:
            raise UserError(f"{folder}: a finished source is there already; use another --out or name, or --overwrite")
        os.remove(manifest)  # first: without it the folder no longer counts as a source
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):
        if name.endswith(".tar") and name.startswith(SPLITS):
            os.remove(os.path.join(folder, name))


def _check_filled(
    pattern: str, splits: dict[str, Split], writers: dict[str, SplitWriter], validation_fraction: float
) -> None:
    total = sum(split.documents for split in splits.values())
    for name in SPLITS if validation_fraction else SPLITS[:1]:
        if splits[name].rows == 0:
            raise UserError(
                f"{pattern}: the {name} split got {splits[name].documents} of {total} documents and "
                f"{writers[name].packer.left} ids, less than one row; use more text, a shorter --seq-len, another "
                f"--validation-fraction (now {validation_fraction:g}), or cut long documents with --document-chars 4000"
            )
