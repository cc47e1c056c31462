"""Saving: every rank writes its files in the background, and rank 0 commits once all of them are durable.

The protocol, for a tag `step_00000100` and the folder of this attempt of the run (`llama_ds.checkpoint.attempt`):

1. Each rank writes its files to `attempt_X/step_00000100`, hashes them while writing, and syncs them and the folder.
2. It then writes its record `rank_00003.json`: the files it wrote and the location of every tensor. The record appears
   by a rename, the rank's last operation in the folder: from then on, rank 0 may commit and rename the folder.
3. Rank 0 waits for the records of all ranks, and durably writes the index and the description.
4. It renames the folder to `step_00000100`, syncs, and makes `latest` name it.

Whenever a process dies, the folder is either a partial checkpoint that no reader sees (before step 4) or a complete
one. Ranks communicate only through the folder, so no collective runs concurrently with those of training.

When an attempt begins, processes of an earlier attempt may be anywhere in these steps. Their files and records are in
another folder, which is moved away before this attempt's first save. Their step 4 has either happened by then or fails.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch
import xxhash

from llama_ds.atomic_files import write_atomically
from llama_ds.checkpoint.attempt import SaveAttempt
from llama_ds.checkpoint.manifest import (
    Description,
    FileEntry,
    Record,
    StoredPiece,
    name_of,
    sync,
    write_manifest,
)
from llama_ds.checkpoint.snapshot import Snapshot
from llama_ds.checkpoint.store import Retention
from llama_ds.log import logger

POLL_S = 0.02  # initial polling interval for the other ranks' records; it grows to twenty times as much
WRITE_BYTES = 1 << 20  # bytes per write call, small enough that hashed data is still in the CPU cache


class Abandoned(Exception):
    """Raised when a save is abandoned because another rank failed to write its files."""


class Writer:
    """Writes one rank's share of an attempt's saves. At most one save is in flight."""

    def __init__(
        self, attempt: SaveAttempt, rank: int, ranks: int, tokenizer: Callable[[], Mapping[str, bytes]], keep: Retention
    ) -> None:
        """Prepare saves. `attempt` is the same on every rank; rank 0 writes the files of `tokenizer`, by name."""
        self.attempt, self.rank, self.ranks = attempt, rank, ranks
        self.tokenizer, self.keep = tokenizer, keep
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._abandoned = threading.Event()
        self.error: Exception | None = None
        self._step = 0  # step of the save in flight
        self.seconds = 0.0  # duration of the last save in the background

    def start(self, description: Description, snapshot: Snapshot) -> None:
        """Begin to write. The caller must have waited for the previous save."""
        assert self._thread is None, "a save is in flight"
        self._written.clear()
        self._abandoned.clear()
        self.error = None
        self._step = description.step
        self._thread = threading.Thread(target=self._run, args=(description, snapshot), name="checkpoint")
        self._thread.start()

    @property
    def in_flight(self) -> bool:
        """Whether a save was started and not yet waited for."""
        return self._thread is not None

    @property
    def ended(self) -> bool:
        """Whether the save in flight has finished; on rank 0, including the commit."""
        return self._thread is not None and not self._thread.is_alive()

    def wait_written(self) -> Exception | None:
        """Wait until this rank's own files are durable; return the error of the save, if any."""
        if self._thread:
            self._written.wait()
        return self.error

    def wait_committed(
        self, abandon: bool = False, timeout_s: float = math.inf, hurried: Callable[[], bool] = lambda: False
    ) -> Exception | None:
        """Wait for the save to finish, on rank 0 for the commit; return its error, if any.

        `abandon`, a timeout or `hurried` gives the save up because a rank did not write its files. Rank 0 deletes a
        failed save.
        """
        if self._thread is None:
            return None
        deadline = time.monotonic() + timeout_s
        while self._thread.is_alive() and not abandon:
            self._thread.join(min(POLL_S, max(deadline - time.monotonic(), 0.0)))
            abandon = time.monotonic() > deadline or hurried()
        if abandon:
            self._abandoned.set()
        self._thread.join()
        self._thread = None
        if self.error and self.rank == 0:  # all ranks have stopped writing: the caller has waited for them
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
        except Exception as error:  # any error must be reported to the training thread
            self.error = error
            logger.error("step %d is not saved: %s: %s", description.step, type(error).__name__, error)
            self._written.set()
        self.seconds = time.monotonic() - begin


def write_rank(partial: str, rank: int, snapshot: Snapshot) -> None:
    """Write one rank's files, sync them, and then write its record.

    Raises:
        OSError: a file operation failed.
    """
    with suppress(FileExistsError):  # mkdir, not makedirs: only `SaveAttempt.begin` creates the attempt's folder
        os.mkdir(partial)
    record = Record(rank)
    if snapshot.ready is not None:
        snapshot.ready.synchronize()
    files: dict[str, HashedFile] = {}
    with ExitStack() as open_files:  # files are synced only on exit, so that writeback overlaps with further writes
        for name, tree in snapshot.files.items():
            files[name] = open_files.enter_context(HashedFile(os.path.join(partial, name)))
            save_tree(tree, files[name])
            record.files[name] = FileEntry(files[name].size, files[name].checksum, rank)
    for copied in snapshot.copied:
        wanted, leaf, file = copied.wanted, copied.leaf, files[copied.file]
        offset = file.offsets[leaf.data_ptr()] + copied.begin * leaf.element_size()
        dtype = str(leaf.dtype).removeprefix("torch.")
        piece = StoredPiece(wanted.kind, wanted.part, wanted.start, wanted.tensor.numel(), copied.file, offset, dtype)
        record.pieces.setdefault(name_of(wanted.key), []).append(piece)
    sync(partial)
    path = os.path.join(partial, _record_name(rank))
    write_atomically(path, record.as_json(), durable=True)


def collect(partial: str, ranks: int, abandoned: Callable[[], bool]) -> list[Record]:
    """Wait for the records of all ranks and return them.

    Raises:
        Abandoned: another rank did not write its files.
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
    attempt: SaveAttempt,
    description: Description,
    records: list[Record],
    tokenizer: Callable[[], Mapping[str, bytes]],
    keep: Retention,
) -> None:
    """Commit the files of all ranks as the newest checkpoint; then delete checkpoints that are no longer retained.

    Raises:
        ValueError: the checkpoint would not be resumable.
        OSError: a file operation failed.
    """
    kinds = {piece.kind for record in records for rows in record.pieces.values() for piece in rows}
    if missing := set(description.states.all_kinds()) - kinds:
        raise ValueError(f"step {description.step}: no {', '.join(sorted(missing))} of any weight was written")
    partial = attempt.partial(description.step)
    for name, content in tokenizer().items():
        os.makedirs(os.path.dirname(os.path.join(partial, name)), exist_ok=True)  # chat templates have a folder
        with HashedFile(os.path.join(partial, name)) as target:
            target.write(content)
    write_manifest(partial, description, records)
    for record in records:
        os.unlink(os.path.join(partial, _record_name(record.rank)))
    attempt.publish(description.step)
    try:
        attempt.remove_old(keep)
    except OSError as error:  # the new checkpoint is committed nevertheless
        logger.warning("%s: old checkpoints cannot be removed (%s)", attempt.folder, error)


def save_tree(tree: Any, file: HashedFile) -> None:
    """Call torch.save without its own checksum of every tensor, since the entire file has one."""
    enabled = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tree, file)  # type: ignore[arg-type]
    finally:
        torch.serialization.set_crc32_options(enabled)


class HashedFile:
    """A file being written, with its checksum and the offset of every memory buffer. It is synced when closed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = 0
        self.offsets: dict[int, int] = {}  # offset in the file by memory address of the data
        self._digest = xxhash.xxh3_128()
        self._error: OSError | None = None  # the first error, which torch would replace by a RuntimeError of its own

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
        """Append all bytes of `data`."""
        view = memoryview(data).cast("B")
        if len(view):
            self.offsets.setdefault(np.frombuffer(view, np.uint8).ctypes.data, self.size)
        for begin in range(0, len(view), WRITE_BYTES):
            left = view[begin : begin + WRITE_BYTES]
            self._digest.update(left)
            while left:
                left = left[self._write(left) :]
            # DONTNEED makes Linux start writeback now; otherwise the final fsync would wait for all of it.
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
        """Do nothing, because writes are not buffered."""

    @property
    def checksum(self) -> str:
        """Checksum of all bytes written so far, equal to `llama_ds.checkpoint.manifest.checksum` of the file."""
        return self._digest.hexdigest()


def _record_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"
