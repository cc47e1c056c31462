"""A run's folder in the memory of one host: made, checked, measured, and freed when the job has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.job import memory_keeper
from llama_ds.job.folder import VARIABLE
from llama_ds.job.memory_slots import remove_others, reserved_bytes, run_folder
from llama_ds.job.run_lock import LAUNCHER, LEASE_S, RANKS
from llama_ds.machine import memory_left_to_group


class MemoryFolder:
    """The folder of a run on `host`. `path` need not exist."""

    def __init__(self, run: RunConfig, host: str) -> None:
        self._run, self._host = run, host
        self._of_run = run_folder(run.checkpoint.memory_folder, run.run_dir)
        self.path: Path = self._of_run / host

    def check_owner(self) -> None:
        """Check that nobody else has made the folder, or may read it.

        Raises:
            UserError: the folder is another's.
        """
        try:
            about = self._of_run.lstat()
        except OSError:
            return
        if self._of_run.is_symlink() or about.st_uid != os.getuid() or about.st_mode & 0o077:
            raise UserError(
                f"{self._of_run}: on {self._host} others may write to it or read it; delete it, or name another "
                "checkpoint.memory_folder"
            )

    def make(self) -> None:
        """Make the folder, if it does not exist, and see to it that it does not outlive the job.

        Raises:
            UserError: it cannot be made, or is another's.
        """
        try:
            for folder in (self._of_run, self.path):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"checkpoint.memory_folder = {self._run.checkpoint.memory_folder}: {error.filename} cannot be made on "
                f"{self._host} ({error.strerror}); name a file system in memory that you may write to"
            ) from None
        self.check_owner()
        if memory_keeper.is_kept(str(self.path)):  # by that of an earlier attempt; to start Python takes 0.1 s or more
            return
        locks = [os.path.join(os.path.abspath(self._run.run_dir), name) for name in (RANKS, LAUNCHER)]
        subprocess.run(  # it forks, so that it is no child of this rank, whose children launchers kill
            [sys.executable, "-I", memory_keeper.__file__, str(self.path), str(LEASE_S), *locks],
            cwd="/",
            # Without the variable by which the supervisor finds processes of the job, and ends them.
            env={name: value for name, value in os.environ.items() if name != VARIABLE},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            check=False,
        )

    def prepare(self, ranks: set[int], nbytes: int) -> None:
        """Keep the files of `ranks` only, and check that their `nbytes` fit into the memory of this host.

        Raises:
            UserError: as `make`, or they do not fit.
        """
        self.make()
        remove_others(self.path, ranks)
        stats = os.statvfs(self.path)
        limits = (stats.f_bavail * stats.f_frsize, psutil.virtual_memory().available, memory_left_to_group())
        free = min(limit for limit in limits if limit is not None)
        if nbytes - reserved_bytes(self.path) > free:
            raise self.too_little(f"{nbytes / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB free", ranks)

    def too_little(self, problem: str, ranks: set[int]) -> UserError:
        """Return the error that states do not fit."""
        settings = self._run.checkpoint
        return UserError(
            f"checkpoint.memory_interval = {settings.memory_interval}: the states of rank "
            f"{', '.join(map(str, sorted(ranks)))} do not fit into {settings.memory_folder} on {self._host}: "
            f"{problem}; enlarge it (mount -o remount,size=...), use more data-parallel ranks, each of which then has "
            "less, or set checkpoint.memory_interval=0"
        )
