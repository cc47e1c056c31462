"""Working folder of a conversion, beside its destination: resumable after a kill, and renamed once it is complete.

`DST.partial` holds the output files and a journal. The journal's first line is a fingerprint of source and outputs;
one line follows for each file that is finished and durable. A lock on the journal excludes a second conversion.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from llama_ds.checkpoint.manifest import sync
from llama_ds.errors import UserError

JOURNAL = ".conversion"
PARTIAL, REPLACED = ".partial", ".replaced-"  # what is appended to the name of a destination
FULL_DISK_BYTES = 1 << 20  # after a failed write, a disk with less free space than this counts as full


def cannot_write(path: str, error: OSError | RuntimeError) -> UserError:
    """Return the user's error for a file or folder that cannot be written."""
    if not isinstance(error, OSError):  # torch's C++ writer does not report the reason
        full = shutil.disk_usage(os.path.dirname(path)).free < FULL_DISK_BYTES
        reason = os.strerror(errno.ENOSPC) if full else str(error).partition("\n")[0]
    else:
        reason = error.strerror or str(error)
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return UserError(f"{path}: cannot be written ({reason}); give a destination where you may write")
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG):
            return UserError(f"{path}: cannot be created ({reason}); give another destination")
    return UserError(
        f"{path}: cannot be written ({reason}); free space, or repair the disk, and run the same command again: it "
        "resumes where it stopped"
    )


class Partial:
    """The working folder for one destination."""

    def __init__(self, destination: str, fingerprint: str, overwrite: bool) -> None:
        """Create the folder, or resume the one of a conversion that was killed.

        Raises:
            UserError: the destination exists and `overwrite` is false, or the folder belongs to another conversion.
        """
        self.destination = os.path.abspath(destination)
        self.folder = self.destination + PARTIAL
        self._overwrite = overwrite
        self.finished: dict[str, str] = {}  # checksum by file name; "" if it was not computed
        self._journal_path = os.path.join(self.folder, JOURNAL)
        self._lock = threading.Lock()
        if os.path.lexists(self.destination) and not overwrite:
            raise UserError(f"{destination}: exists already; give another folder or --overwrite")
        try:
            self._open(fingerprint)
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._journal)

    def finish(self, name: str, checksum: str = "") -> None:
        """Record that a file is complete and durable."""
        with self._lock:
            size = os.path.getsize(os.path.join(self.folder, name))
            self._append({"file": name, "size": size, "checksum": checksum})
            self.finished[name] = checksum

    def spoil(self) -> None:
        """Change the journal, so that no conversion resumes in this folder, and no reader takes it for a model."""
        os.ftruncate(self._journal, 0)
        self._append({"fingerprint": "of files that failed their verification"})

    def commit(self, name: str | None = None) -> None:
        """Rename the folder to the destination, or only the file `name` in it.

        An existing destination is moved aside first, and then removed, with those that a killed conversion moved aside.

        Raises:
            UserError: a file operation failed.
        """
        old = f"{self.destination}{REPLACED}{os.getpid()}"
        parent = os.path.dirname(self.destination)
        try:
            for folder, _, _ in os.walk(self.folder):
                sync(folder)
            if os.path.lexists(self.destination):
                os.rename(self.destination, old)
            os.unlink(self._journal_path)
            os.rename(os.path.join(self.folder, name) if name else self.folder, self.destination)
            sync(parent)
            if name:
                os.rmdir(self.folder)
            for path in self._moved_aside() if self._overwrite else ():
                _remove(path)
        except OSError as error:
            raise cannot_write(self.destination, error) from None

    def _open(self, fingerprint: str) -> None:
        os.makedirs(os.path.dirname(self.destination), exist_ok=True)
        if os.path.lexists(self.folder) and not self._is_of(fingerprint):
            if not self._overwrite:
                raise UserError(
                    f"{self.folder}: was left by a conversion of another source or with other options; remove it, or "
                    "give --overwrite"
                )
            self._remove_folder()
        os.makedirs(self.folder, exist_ok=True)
        self._journal = self._locked()
        lines, size = self._read_journal()
        os.ftruncate(self._journal, size)  # drop a truncated last line
        if not lines:
            self._append({"fingerprint": fingerprint})
            sync(self.folder)
            sync(os.path.dirname(self.folder))
        self.finished = {line["file"]: line["checksum"] for line in lines[1:] if self._is_there(line)}

    def _moved_aside(self) -> list[str]:
        """Return the paths of former destinations, also of those that a conversion killed in `commit` had replaced."""
        parent, name = os.path.split(self.destination)
        pattern = re.compile(re.escape(name + REPLACED) + r"\d+")
        return [os.path.join(parent, found) for found in os.listdir(parent) if pattern.fullmatch(found)]

    def _is_there(self, line: dict[str, Any]) -> bool:
        """Return whether a finished file exists at its full size; a power failure may have undone its creation."""
        try:
            return os.path.getsize(os.path.join(self.folder, line["file"])) == line["size"]
        except OSError:
            return False

    def _is_of(self, fingerprint: str) -> bool:
        """Return whether the existing folder belongs to this conversion, or to one that was killed before it began."""
        lines, _ = self._read_journal()
        if lines:
            return lines[0].get("fingerprint") == fingerprint
        return os.path.isdir(self.folder) and not set(os.listdir(self.folder)) - {JOURNAL}

    def _read_journal(self) -> tuple[list[dict[str, Any]], int]:
        """Return the complete lines of the journal and their total size in bytes."""
        lines, size = [], 0
        try:
            for text in Path(self._journal_path).read_bytes().splitlines(keepends=True):
                if not text.endswith(b"\n"):
                    break
                lines.append(json.loads(text))
                size += len(text)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            pass
        return lines, size

    def _remove_folder(self) -> None:
        if os.path.isfile(self._journal_path):
            os.close(self._locked())
        _remove(self.folder)

    def _locked(self) -> int:
        """Open and lock the journal; return its file descriptor."""
        journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(journal)
            raise UserError(f"{self.folder}: another conversion is writing it now; wait for that, or end it") from None
        return journal

    def _append(self, line: dict[str, Any]) -> None:
        os.write(self._journal, (json.dumps(line) + "\n").encode())
        os.fsync(self._journal)


def _remove(path: str) -> None:
    """Remove a file, a folder with its contents, or a link without its target."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def refuse_unfinished(folder: str) -> None:
    """Refuse the working folder of a conversion as a model: its files may have their full size, and still be zeros.

    Raises:
        UserError: it is one.
    """
    if os.path.lexists(os.path.join(folder, JOURNAL)):
        raise UserError(
            f"{folder}: is the working folder of a conversion that was interrupted or failed; run its command again, "
            "and give the folder that it makes"
        )


def written_by_conversion(destination: str) -> Callable[[str], bool]:
    """Return whether a path is the destination, its working folder or one that was moved aside, for `fingerprint`."""
    parent, name = os.path.split(os.path.abspath(destination))
    pattern = re.compile(re.escape(name) + rf"({re.escape(PARTIAL)}|{re.escape(REPLACED)}\d+)?")
    parent = os.path.realpath(parent)
    return lambda path: os.path.dirname(path) == parent and pattern.fullmatch(os.path.basename(path)) is not None
