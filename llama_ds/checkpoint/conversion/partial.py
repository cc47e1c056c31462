"""Where a conversion works: a folder beside its destination, gone on with after a kill, renamed when it is whole.

`DST.partial` holds the files and a journal: first what is being converted to what (a fingerprint), then a line for each
file that is finished and on the disk. A lock on the journal keeps a second conversion out.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from llama_ds.checkpoint.manifest import sync
from llama_ds.errors import UserError

JOURNAL = ".conversion"
NEARLY_NOTHING = 1 << 20  # bytes free on a disk to which something could not be written for want of space


def cannot_write(path: str, error: OSError | RuntimeError) -> UserError:
    """Return the error that a file or folder cannot be written, as the user is to read it."""
    if not isinstance(error, OSError):  # torch's writer in C++, which does not say why
        full = shutil.disk_usage(os.path.dirname(path)).free < NEARLY_NOTHING
        reason = os.strerror(errno.ENOSPC) if full else str(error).partition("\n")[0]
    else:
        reason = error.strerror or str(error)
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return UserError(f"{path}: cannot be written ({reason}); give a destination where you may write")
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG):
            return UserError(f"{path}: cannot be made ({reason}); give another destination")
    return UserError(
        f"{path}: cannot be written ({reason}); free space, or mend the disk, and run the same command again: it goes "
        "on where it stopped"
    )


class Partial:
    """The work on one destination."""

    def __init__(self, destination: str, fingerprint: str, overwrite: bool) -> None:
        """Make the folder, or take up the one of a conversion that was killed.

        Raises:
            UserError: the destination exists and is not to be overwritten, or the folder is another conversion's.
        """
        self.destination = os.path.abspath(destination)
        self.folder = self.destination + ".partial"
        self.finished: dict[str, str] = {}  # checksums by name; "" where none was wanted
        self._journal_path = os.path.join(self.folder, JOURNAL)
        self._lock = threading.Lock()
        if os.path.lexists(self.destination) and not overwrite:
            raise UserError(f"{destination}: exists already; give another folder or --overwrite")
        try:
            self._open(fingerprint, overwrite)
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._journal)

    def finish(self, name: str, checksum: str = "") -> None:
        """Note that a file is whole and on the disk."""
        with self._lock:
            size = os.path.getsize(os.path.join(self.folder, name))
            self._append({"file": name, "size": size, "checksum": checksum})
            self.finished[name] = checksum

    def discard_journal(self) -> None:
        """Make the folder one that no conversion goes on with."""
        os.unlink(self._journal_path)

    def commit(self) -> None:
        """Put the folder in the destination's place; what was there is moved aside first, and then removed.

        Raises:
            UserError: the system refuses.
        """
        old = f"{self.destination}.replaced-{os.getpid()}"
        parent = os.path.dirname(self.destination)
        try:
            sync(self.folder)
            if replaced := os.path.lexists(self.destination):
                os.rename(self.destination, old)
            self.discard_journal()
            os.rename(self.folder, self.destination)
            sync(parent)
            if replaced:
                _remove(old)
        except OSError as error:
            raise cannot_write(self.destination, error) from None

    def _open(self, fingerprint: str, overwrite: bool) -> None:
        os.makedirs(os.path.dirname(self.destination), exist_ok=True)
        if os.path.lexists(self.folder) and not self._is_of(fingerprint):
            if not overwrite:
                raise UserError(
                    f"{self.folder}: was left by a conversion of another source or with other options; remove it, or "
                    "give --overwrite"
                )
            self._remove_folder()
        os.makedirs(self.folder, exist_ok=True)
        self._journal = self._locked()
        lines, size = self._read_journal()
        os.ftruncate(self._journal, size)  # without a last line that was cut short
        if not lines:
            self._append({"fingerprint": fingerprint})
            sync(self.folder)
            sync(os.path.dirname(self.folder))
        self.finished = {line["file"]: line["checksum"] for line in lines[1:] if self._is_there(line)}

    def _is_there(self, line: dict[str, Any]) -> bool:
        """Tell whether a finished file has its size; after a power failure its name may be gone."""
        try:
            return os.path.getsize(os.path.join(self.folder, line["file"])) == line["size"]
        except OSError:
            return False

    def _is_of(self, fingerprint: str) -> bool:
        """Tell whether the folder that is there is this conversion's, or of one killed before it began."""
        lines, _ = self._read_journal()
        if lines:
            return lines[0].get("fingerprint") == fingerprint
        return os.path.isdir(self.folder) and not set(os.listdir(self.folder)) - {JOURNAL}

    def _read_journal(self) -> tuple[list[dict[str, Any]], int]:
        """Return the whole lines of the journal and the bytes they take."""
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
        """Return the journal, open and locked."""
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
    """Remove a folder with what is in it, a file, or a link but not what it names."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
