"""Data sets of tasks from the Hugging Face hub into a local folder, on a machine with a network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from llama_ds.atomic_files import atomic_file
from llama_ds.errors import UserError
from llama_ds.evaluation.suite import split_file
from llama_ds.evaluation.tasks import Task

PARQUET = "refs/convert/parquet"  # the branch in which the hub keeps every data set as Parquet files

Download = Callable[[str, str, str], list[str]]  # repository, subset, split -> local Parquet files


def fetch(task: Task, data: str, download: Download | None = None) -> list[str]:
    """Write the splits of a task that the folder `data` lacks; return their files.

    Raises:
        UserError: the hub cannot be reached, or it has no such split.
    """
    written = []
    for split in dict.fromkeys((task.split, task.shot_split)) if task.dataset else ():
        path = split_file(data, task, split)
        if os.path.exists(path):
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _write_lines((download or from_hub)(task.dataset, task.subset, split), path)
        written.append(path)
    return written


def _write_lines(parquet: list[str], path: str) -> None:
    try:
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError:
        raise UserError("pyarrow is missing, which reads the hub's files; install it: pip install pyarrow") from None

    with atomic_file(path) as out:
        for name in parquet:
            for batch in ParquetFile(name).iter_batches():
                out.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in batch.to_pylist())


def from_hub(repository: str, subset: str, split: str) -> list[str]:
    """Download the Parquet files of a split; return where they are.

    Raises:
        UserError: the hub cannot be reached, or it has no such split.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    except ImportError:
        raise UserError("huggingface_hub is missing; install it: pip install huggingface_hub") from None

    try:
        every = HfApi().list_repo_files(repository, repo_type="dataset", revision=PARQUET)
        names = sorted(name for name in every if name.startswith((f"{subset}/{split}/", f"{subset}/partial-{split}/")))
        found = [hf_hub_download(repository, name, repo_type="dataset", revision=PARQUET) for name in names]
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{repository}: cannot be fetched ({reason}); fetch it on a machine with a network, and copy the folder"
        ) from None
    if not found:
        raise UserError(f"{repository}: the hub has no split {split!r} of {subset!r}; write its JSON lines by hand")
    return found
