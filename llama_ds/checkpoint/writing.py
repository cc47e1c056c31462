"""Saving: every rank writes its files in the background, and rank 0 commits when all of them are on the disk.

The protocol, for a tag `step_00000100` and the folder of this attempt of the run (`llama_ds.checkpoint.attempt`):

1. each rank writes its files to `attempt_X/step_00000100`, hashing them as they go by, and syncs them and the folder;
2. then its record (what it wrote, where every tensor is), `rank_00003.json`. It appears by a rename, the last thing
   that the rank does there: from then on rank 0 may commit, and so rename the folder, at any moment;
3. rank 0 waits for the records of all ranks, and writes index and description, durably;
4. it renames the folder to `step_00000100`, syncs, and makes `latest` name it.

Wherever a process dies, before 4 the folder is a partial checkpoint that nobody reads, and after it a complete one.
Ranks need nothing of one another but the folder, so no collective runs beside the training's.

Processes of an earlier attempt may be anywhere in these steps when an attempt begins. Their files and records are in
another folder. That one is moved away before this attempt's first save, so 4 has happened by then or never does.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch
import xxhash

from llama_ds.checkpoint.attempt import SaveAttempt
from llama_ds.checkpoint.manifest import (
    TOKENIZER,
    Description,
    FileEntry,
    Record,
    StoredPiece,
    name_of,
    sync,
    write_complete,
    write_manifest,
)
from llama_ds.checkpoint.snapshot import Snapshot
from llama_ds.checkpoint.store import Retention
from llama_ds.log import logger

POLL_S = 0.02  # at first, for the other ranks' records; at last twenty times as much
WRITE_BYTES = 1 << 20  # given to the system at once: what was hashed is then still in the processor's cache


class Abandoned(Exception):
    """A save that is given up because another rank's part of it failed."""


class Writer:
    """One rank's share of the saves of an attempt. At most one is under way."""

    def __init__(self, attempt: SaveAttempt, rank: int, ranks: int, tokenizer: str, keep: Retention) -> None:
        """`attempt` is the same on every rank; `tokenizer` goes into each checkpoint."""
        self.attempt, self.rank, self.ranks = attempt, rank, ranks
        self.tokenizer, self.keep = tokenizer, keep
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._abandoned = threading.Event()
        self.error: Exception | None = None
        self._step = 0  # of the save under way
        self.seconds = 0.0  # that the last save took in the background

    def start(self, description: Description, snapshot: Snapshot) -> None:
        """Begin to write. The one before must have been waited for."""
        assert self._thread is None, "a save is under way"
        self._written.clear()
        self._abandoned.clear()
        self.error = None
        self._step = description.step
        self._thread = threading.Thread(target=self._run, args=(description, snapshot), name="checkpoint")
        self._thread.start()

    @property
    def under_way(self) -> bool:
        """Whether a save has not been waited for yet."""
        return self._thread is not None

    @property
    def ended(self) -> bool:
        """Whether the save that is under way has come to its end, on rank 0 to the commit's."""
        return self._thread is not None and not self._thread.is_alive()

    def wait_written(self) -> Exception | None:
        """Wait until this rank's own files are down; return what went wrong, if anything."""
        if self._thread:
            self._written.wait()
        return self.error

    def wait_committed(self, abandon: bool = False, timeout_s: float | None = None) -> Exception | None:
        """Wait for the rest, on rank 0 the commit; return what went wrong, if anything. What failed is removed.

        `abandon` gives the save up: some rank's files are not coming.
        """
        if self._thread is None:
            return None
        if abandon:
            self._abandoned.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._abandoned.set()
            self._thread.join()
        self._thread = None
        if self.error and self.rank == 0:  # only now: until they were waited for, other ranks may have been writing
            self.attempt.discard(self._step)
        return self.error

    def _run(self, description: Description, snapshot: Snapshot) -> None:
        begin = time.monotonic()
        try:
            partial = self.attempt.partial(description.step)
            write_rank(partial, self.rank, snapshot)
            self._written.set()
            if self.rank == 0:
                records = collect(partial, self.ranks, self._abandoned.is_set)
                commit(self.attempt, description, records, self.tokenizer, self.keep)
        except Exception as error:  # of any kind: it is the training's thread that must hear of it
            self.error = error
            logger.error("step %d is not saved: %s: %s", description.step, type(error).__name__, error)
            self._written.set()
        self.seconds = time.monotonic() - begin


def write_rank(partial: str, rank: int, snapshot: Snapshot) -> None:
    """Write one rank's files, sync them, and then write its record.

    Raises:
        OSError: as the system says.
    """
    with suppress(FileExistsError):  # not what it is in: an attempt's folder is made once
        os.mkdir(partial)
    record = Record(rank)
    if snapshot.ready is not None:
        snapshot.ready.synchronize()
    files: dict[str, HashedFile] = {}
    with ExitStack() as open_files:  # they are synced together at its end: the disk works while the next are written
        for name, tree in snapshot.files.items():
            files[name] = open_files.enter_context(HashedFile(os.path.join(partial, name)))
            save_tree(tree, files[name])
            record.files[name] = FileEntry(files[name].size, files[name].checksum, rank)
    for copied in snapshot.copied:
        wanted, leaf, file = copied.wanted, copied.leaf, files[copied.file]
        offset = file.places[leaf.data_ptr()] + copied.begin * leaf.element_size()
        dtype = str(leaf.dtype).removeprefix("torch.")
        piece = StoredPiece(wanted.kind, wanted.part, wanted.start, wanted.tensor.numel(), copied.file, offset, dtype)
        record.pieces.setdefault(name_of(wanted.key), []).append(piece)
    sync(partial)
    path = os.path.join(partial, _record_name(rank))
    write_complete(path, record.as_json(), path + ".tmp")


def collect(partial: str, ranks: int, abandoned: Callable[[], bool]) -> list[Record]:
    """Wait for the records of all ranks and return them.

    Raises:
        Abandoned: another rank's is not coming.
    """
    wanted, pause = {_record_name(rank) for rank in range(ranks)}, POLL_S
    while not wanted <= {entry.name for entry in os.scandir(partial)}:
        if abandoned():
            raise Abandoned("another rank did not write its files")
        time.sleep(pause)
        pause = min(pause * 1.2, 20 * POLL_S)
    records = []
    for name in sorted(wanted):
        with open(os.path.join(partial, name), encoding="utf-8") as file:
            records.append(Record.from_json(file.read()))
    return records


def commit(
    attempt: SaveAttempt, description: Description, records: list[Record], tokenizer: str, keep: Retention
) -> None:
    """Make what all ranks have written the newest checkpoint; then remove what is kept no longer.

    Raises:
        ValueError: a run could not go on from it.
        OSError: as the system says.
    """
    kinds = {piece.kind for record in records for rows in record.pieces.values() for piece in rows}
    if missing := set(description.states.all_kinds()) - kinds:
        raise ValueError(f"step {description.step}: no {', '.join(sorted(missing))} of any weight was written")
    partial = attempt.partial(description.step)
    if tokenizer:
        with open(tokenizer, "rb") as source, HashedFile(os.path.join(partial, TOKENIZER)) as target:
            target.write(source.read())
    write_manifest(partial, description, records)
    for record in records:
        os.unlink(os.path.join(partial, _record_name(record.rank)))
    attempt.publish(description.step)
    try:
        attempt.remove_old(keep)
    except OSError as error:  # this one is there all the same
        logger.warning("%s: old checkpoints cannot be removed (%s)", attempt.folder, error)


def save_tree(tree: Any, file: HashedFile) -> None:
    """torch.save without its own checksum of every tensor: the whole file has one."""
    computes = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tree, file)  # type: ignore[arg-type]
    finally:
        torch.serialization.set_crc32_options(computes)


class HashedFile:
    """A file being written: its checksum, and where in it every buffer of memory went. Synced when it is closed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = 0
        self.places: dict[int, int] = {}  # byte in the file of what lay at an address
        self._digest = xxhash.xxh3_128()
        self._error: OSError | None = None  # the first: of one that it is told torch makes a RuntimeError of its own

    def __enter__(self) -> HashedFile:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                os.fsync(self._file)
        finally:
            os.close(self._file)
        if self._error and error is not self._error:
            raise self._error from None

    def write(self, data: Any) -> int:
        """Append bytes, all of them."""
        view = memoryview(data).cast("B")
        if len(view):
            self.places.setdefault(np.frombuffer(view, np.uint8).ctypes.data, self.size)
        for begin in range(0, len(view), WRITE_BYTES):
            left = view[begin : begin + WRITE_BYTES]
            self._digest.update(left)
            while left:
                left = left[self._write(left) :]
            # Linux begins to write what it is told is not needed; the sync at the end would else wait for all of it.
            os.posix_fadvise(self._file, self.size + begin, WRITE_BYTES, os.POSIX_FADV_DONTNEED)
        self.size += len(view)
        return len(view)

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._file, data)
        except OSError as error:
            self._error = self._error or error
            raise

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    @property
    def checksum(self) -> str:
        """Of all bytes so far, as `llama_ds.checkpoint.manifest.checksum` computes it."""
        return self._digest.hexdigest()


def _record_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"
