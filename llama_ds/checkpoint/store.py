"""The run's folder of checkpoints: one tag per saved step, described by a file, named by `latest` once complete."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from typing import Any

from llama_ds.config.layout import Layout
from llama_ds.config.rules import STOCK_ENGINE
from llama_ds.errors import UserError

LATEST = "latest"
DESCRIPTION = "llama_ds.json"
TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class Description:
    """What a checkpoint is: enough to resume or convert it without the run file that made it."""

    step: int
    tokens: int
    zero_stage: int
    dtype: str  # of the weights that computed: bf16 | fp32
    layout: dict[str, int]
    run: dict[str, Any]  # the resolved run
    data: dict[str, Any] = field(default_factory=dict)  # `llama_ds.data.mixture.DataState`
    files: dict[str, int] = field(default_factory=dict)  # bytes of each of its files, filled in by `commit`


def tag_of(step: int) -> str:
    """Return the tag (folder name) of the checkpoint of `step`."""
    return f"step_{step:08d}"


def newest(folder: str) -> str | None:
    """Return the tag that `latest` names, or None where nothing was committed yet.

    Raises:
        UserError: when the tag it names is not there.
    """
    pointer = os.path.join(folder, LATEST)
    if not os.path.exists(pointer):
        return None
    with open(pointer) as file:
        tag = file.read().strip()
    if not os.path.exists(os.path.join(folder, tag, DESCRIPTION)):
        raise UserError(
            f"{pointer}: names checkpoint '{tag}', which is missing or incomplete; "
            f"write the name of a complete one into it, or delete it to start over"
        )
    return tag


def commit(folder: str, description: Description, tokenizer: str) -> None:
    """Describe a tag whose every file is down and make `latest` name it, atomically.

    To be called by one rank, after a barrier behind all ranks' writes: DeepSpeed would write `latest` before.
    """
    tag = os.path.join(folder, tag_of(description.step))
    shutil.copyfile(tokenizer, os.path.join(tag, TOKENIZER))
    description = replace(description, files=_sizes(tag))
    _write(os.path.join(tag, DESCRIPTION), json.dumps(asdict(description), indent=1))
    _write(os.path.join(folder, LATEST), tag_of(description.step))


def describe(tag_folder: str) -> Description:
    """Read the description of a checkpoint folder.

    Raises:
        UserError: when the folder holds none.
    """
    path = os.path.join(tag_folder, DESCRIPTION)
    if not os.path.exists(path):
        raise UserError(
            f"{tag_folder}: no {DESCRIPTION} in it, so it is not a complete checkpoint of llama_ds; "
            "give a folder such as runs/NAME/checkpoints/step_00000100"
        )
    with open(path) as file:
        return Description(**json.load(file))


def check_files(tag_folder: str, description: Description) -> None:
    """Check that the files of a checkpoint are all there at their full size.

    Raises:
        UserError: naming the first that is not.
    """
    found = _sizes(tag_folder)
    for name, size in description.files.items():
        if found.get(name) != size:
            state = f"is {found[name]} bytes, not {size}" if name in found else "is missing"
            raise UserError(
                f"{os.path.join(tag_folder, name)}: {state}, the checkpoint is damaged; copy it again, or write the "
                f"name of an older one into {os.path.join(os.path.dirname(tag_folder), LATEST)}"
            )


def check_resumable(tag_folder: str, found: Description, run: dict[str, Any], layout: Layout, zero_stage: int) -> None:
    """Refuse to continue a checkpoint of another model, data order or layout.

    Raises:
        UserError: naming what differs.
    """
    for key in ("model", "seed", "training.global_batch", "data.seq_len"):  # rows are counted by steps of one size
        then, now = (reduce(lambda node, part: node[part], key.split("."), whole) for whole in (found.run, run))
        if then != now:
            raise UserError(
                f"{tag_folder}: was trained with {key} {_difference(then, now)}; "
                "use the same run file, or another name for a new run"
            )
    here = {**asdict(layout), "zero_stage": zero_stage, "engine": _engine(run)}
    there = {**found.layout, "zero_stage": found.zero_stage, "engine": _engine(found.run)}
    fixed = ("pp", "tp", "dp", "zero_stage", "engine")
    if any(here[k] != there[k] for k in fixed):
        raise UserError(
            f"{tag_folder}: was written under {_words(there, fixed)}, this run has {_words(here, fixed)}; "
            "resume under the layout it was written with"
        )


def _engine(run: dict[str, Any]) -> str:
    """Return whose pipeline engine a run has: their optimizer files differ. One stage has only DeepSpeed's."""
    parallel = run["parallel"]
    stock = parallel["pp"] == 1 or parallel.get("schedule", STOCK_ENGINE) == STOCK_ENGINE
    return "deepspeed" if stock else "llama_ds"


def _sizes(folder: str) -> dict[str, int]:
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.name != DESCRIPTION}


def _words(values: dict[str, Any], keys: tuple[str, ...]) -> str:
    return ", ".join(f"{k} {values[k]}" for k in keys)


def _difference(then: Any, now: Any) -> str:
    if not isinstance(then, dict):
        return f"{then}, not {now}"
    return ", ".join(f"{k} {then.get(k)}, not {now.get(k)}" for k in {**then, **now} if then.get(k) != now.get(k))


def _write(path: str, text: str) -> None:
    with open(path + ".tmp", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
