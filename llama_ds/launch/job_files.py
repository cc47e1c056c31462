"""The launcher's side of a job's folder (`llama_ds.job.folder`): creates it and the files of an attempt."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from llama_ds.errors import UserError
from llama_ds.job.folder import Job
from llama_ds.job.run_lock import LAUNCHER, RANKS, RunLock, in_use, living_holder, wait_until_free
from llama_ds.job.wire import TOKEN_BYTES
from llama_ds.launch.hostfile import write_hostfile


def new_folder(run_dir: str) -> Path:
    """Create the folder of a new job of a run, and return it."""
    jobs = Path(os.path.abspath(run_dir), "jobs")
    try:
        jobs.mkdir(parents=True, exist_ok=True)
        number = max((int(path.name) for path in jobs.iterdir() if path.name.isdecimal()), default=0)
        while True:
            number += 1
            try:
                (jobs / f"{number:04d}").mkdir()
            except FileExistsError:  # another launcher has just started
                continue
            return jobs / f"{number:04d}"
    except OSError as error:
        raise UserError(f"{jobs}: cannot be written ({error.strerror}); set output_dir to another folder") from None


def lock_run(run_dir: str, folder: Path, orphan_s: float, print_line: Callable[[str], None]) -> RunLock:
    """Lock a run for the job in `folder`, which lasts between its attempts too; return the lock, to be released.

    Ranks whose launcher was killed save and end within `orphan_s`; this waits for them.

    Raises:
        UserError: another job trains the run. The job's folder is removed again.
    """
    lock = RunLock(run_dir, LAUNCHER, job=str(folder), say=print_line)
    try:
        lock.acquire()
        ranks = living_holder(run_dir, RANKS, str(folder), print_line)
        if ranks and not (ranks.job and wait_until_free(run_dir, ranks, 2 * orphan_s, print_line)):
            lock.release()
            raise in_use(run_dir, ranks)
    except UserError:
        folder.rmdir()
        raise
    return lock


def prepare(job: Job, arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
    """Write the files of an attempt; `variables` are environment variables for the ranks that are secrets."""
    for name in ("logs", "stacks"):
        Path(job.folder, name).mkdir(parents=True)
    _write_private(job.path("token"), secrets.token_bytes(TOKEN_BYTES).hex())
    if variables:
        _write_private(job.path("secrets"), json.dumps(dict(variables)))
    write_hostfile(job.path("hostfile"), job.hosts)
    Path(job.path("arguments")).write_text("".join(f"{line}\n" for line in arguments), encoding="utf-8")
    Path(job.path("job.json")).write_text(json.dumps(asdict(job), indent=1), encoding="utf-8")


def _write_private(path: str, text: str) -> None:
    """Write a new file that only its owner can read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
