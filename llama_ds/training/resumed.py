"""What differs between a run that resumes and the checkpoint that it resumes from, for the log."""

from __future__ import annotations

from typing import Any

from llama_ds.checkpoint.load_model import run_of
from llama_ds.checkpoint.manifest import Description
from llama_ds.config.differences import differences, shown
from llama_ds.config.run_file import resolved
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import Layout

NOT_COMPARED = (
    *("path", "deepspeed_path"),  # where the run was read from, not what it is
    # keys of the run, too
    *("layout.pp", "layout.cp", "layout.tp", "layout.micro_batch", "layout.global_batch"),
)


def changes(run: RunConfig, layout: Layout, dtype: str, folder: str, found: Description) -> list[str]:
    """Return a line for each key of the run, each size of its layout, and its dtype, if the checkpoint has another.

    Keys that the version which wrote the checkpoint did not have count with their defaults.
    """
    then = {**_recorded(folder, found), "layout": found.layout, "dtype": found.dtype}
    now = {**resolved(run), "layout": layout.as_data(), "dtype": dtype}
    compared = (one for one in differences(then, now) if one[0] not in NOT_COMPARED)
    return [f"{key} {shown(before)} -> {shown(after)}" for key, before, after in compared]


def _recorded(folder: str, found: Description) -> dict[str, Any]:
    try:
        return resolved(run_of(folder, found))
    except UserError:  # a key of that version is unknown to this one
        return found.run
