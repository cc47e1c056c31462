"""The checkpoint folder of a run: one folder for each saved step; `latest` names the newest.

Names: `step_00000100` is a complete checkpoint. A suffix marks one that was set aside: `.damaged` failed verification,
`.rewound` is newer than the step that the run was rewound to. `attempt_0123456789abcdef` belongs to one start of the
run's ranks (`llama_ds.checkpoint.attempt`). It holds the checkpoint that is being written, and those being deleted,
`.replaced` and `.removed`. Earlier versions kept these, and the one being written (`.partial`), beside the checkpoints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

from llama_ds.checkpoint.manifest import DESCRIPTION, Description
from llama_ds.config.batch_stages import trained_batches
from llama_ds.config.reader import plain
from llama_ds.config.row_stages import trained_lengths
from llama_ds.errors import UserError

LATEST = "latest"
DAMAGED, REWOUND, REPLACED, REMOVED = ".damaged", ".rewound", ".replaced", ".removed"
ATTEMPT = "attempt_"
_TAG = re.compile(r"step_(\d{8,})")
_SET_ASIDE = re.compile(rf"{_TAG.pattern}(\.damaged|\.rewound)(-\d+)?")
_LEFTOVER = re.compile(rf"{ATTEMPT}[0-9a-f]{{16}}|{_TAG.pattern}\.(partial|replaced|removed)[\d-]*|{LATEST}\.tmp")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are retained after a save: the newest `last`, and those of every `every`-th step.

    Unless all are retained, a rewound checkpoint is deleted once the run has saved a later step.
    """

    last: int = 0  # 0: retain all
    every: int = 0  # 0: retain no others


def tag_of(step: int) -> str:
    """Return the tag (folder name) of the checkpoint of `step`."""
    return f"step_{step:08d}"


def step_of(tag: str) -> int:
    """Return the step of a tag, with or without a suffix."""
    match = _TAG.match(tag)
    assert match
    return int(match[1])


def is_leftover(name: str) -> bool:
    """Return whether a name in the folder belongs to an attempt, or to an unfinished save of an earlier version."""
    return bool(_LEFTOVER.fullmatch(name))


def is_set_aside(name: str) -> bool:
    """Return whether a name is that of a checkpoint that was set aside."""
    return bool(_SET_ASIDE.fullmatch(name))


def tags(folder: str) -> list[str]:
    """Return the tags of the complete checkpoints in a folder, newest first."""
    if not os.path.isdir(folder):
        return []
    found = [name for name in os.listdir(folder) if _TAG.fullmatch(name)]
    complete = [name for name in found if os.path.lexists(os.path.join(folder, name, DESCRIPTION))]
    return sorted(complete, key=step_of, reverse=True)


def newest(folder: str) -> str | None:
    """Return the tag named by `latest`; if it is missing, the newest complete checkpoint; else None."""
    complete = tags(folder)
    latest = latest_tag(folder)
    return latest if latest in complete else next(iter(complete), None)


def candidates(folder: str) -> list[str]:
    """Return the tags to resume from in the order to try them: the one named by `latest`, then newest first.

    The tag named by `latest` is included even if its checkpoint is missing: that is damage, not a run that never saved.
    """
    latest = latest_tag(folder)
    others = [tag for tag in tags(folder) if tag != latest]
    return [latest, *others] if latest else others


def expired_rewound(folder: str) -> list[str]:
    """Return the rewound checkpoints whose step is before that of `latest`."""
    latest = latest_tag(folder)
    rewound = [n for n in os.listdir(folder) if re.fullmatch(rf"{_TAG.pattern}{re.escape(REWOUND)}[\d-]*", n)]
    return sorted(name for name in rewound if latest and step_of(name) < step_of(latest))


def check_resumable(tag_folder: str, found: Description, run: dict[str, Any]) -> None:
    """Refuse to resume from a checkpoint with another model or data order, after the run's end, or with weights only.

    Raises:
        UserError: the checkpoint cannot be resumed; the message names what differs.
    """
    if found.optimizer_steps is None:
        raise UserError(
            f"{tag_folder}: holds weights only, no optimizer states, so it cannot be resumed; "
            "start a run from it with checkpoint.start_from"
        )
    # Keys that the version which wrote the checkpoint did not have count with their defaults.
    then = {**found.run, "model": plain(found.model)}
    # The optimizer decides which states there are; earlier versions had only AdamW with fp32 masters.
    first = {"name": "adamw", "masters": "fp32"}
    then, run = ({**config, "optimizer": {**first, **config.get("optimizer", {})}} for config in (then, run))
    # A step implies a position in the data.
    _check_lengths(tag_folder, found, then, run)
    for key in ("model", "seed", "optimizer.name", "optimizer.masters"):
        before, now = (reduce(lambda node, part: node[part], key.split("."), config) for config in (then, run))
        if before != now:
            raise UserError(
                f"{tag_folder}: was trained with {key} {_difference(before, now)}; "
                "use the same run file, or another name for a new run"
            )
    steps = run["training"]["steps"]
    if found.step > steps:
        raise UserError(
            f"{tag_folder}: is at step {found.step}, after the last one of a run with training.steps = {steps}; "
            "set more steps, or go back first with checkpoint.rewind_to"
        )


def _check_lengths(tag_folder: str, found: Description, then: dict[str, Any], run: dict[str, Any]) -> None:
    """Refuse other rows in the steps before the checkpoint; stages may give later ones another length or number."""
    _check_batches(tag_folder, found, then, run)
    batches = [config["training"]["global_batch"] * config["data"]["seq_len"] for config in (then, run)]
    if then["training"].get("batch_stages") or run["training"].get("batch_stages"):
        batches = [0, 0]
    lengths = [trained_lengths(config, found.step) for config in (then, run)]
    if not then["data"].get("stages") and not run["data"].get("stages"):
        lengths = [[(config["data"]["seq_len"], found.step)] for config in (then, run)]
    if lengths[0] == lengths[1] and batches[0] == batches[1]:
        return
    if lengths[0] == lengths[1]:
        rows = [batch // lengths[0][0][0] if lengths[0] else batch for batch in batches]
        staged = then["data"].get("stages") or run["data"].get("stages")
        larger = (
            f"; to continue with {rows[1]}, set training.batch_stages: [{{global_batch: {rows[0]}, until_step: "
            f"{found.step}}}]"
        )
        raise UserError(
            f"{tag_folder}: was trained with training.global_batch {rows[0]}, not {rows[1]}; "
            f"use the same run file, or another name for a new run{larger if rows[1] > rows[0] and not staged else ''}"
        )
    before, now = ("; ".join(f"{length} for {steps} steps" for length, steps in each) for each in lengths)
    if len(lengths[0]) == len(lengths[1]) == 1:
        before, now = (str(each[0][0]) for each in lengths)
    raise UserError(
        f"{tag_folder}: was trained with data.seq_len {before}, not {now}; use the same run file, or another name for "
        f"a new run{_longer_rows(lengths[0], lengths[1][-1][0])}"
    )


def _check_batches(tag_folder: str, found: Description, then: dict[str, Any], run: dict[str, Any]) -> None:
    """Refuse stages of `training.batch_stages` other than those that were trained."""
    if not then["training"].get("batch_stages") and not run["training"].get("batch_stages"):
        return
    before, now = (trained_batches(config, found.step) for config in (then, run))
    if before != now:
        shown = ["; ".join(f"{rows} for {steps} steps" for rows, steps in each) for each in (before, now)]
        raise UserError(
            f"{tag_folder}: was trained with training.global_batch {shown[0]}, not {shown[1]}; keep the entries of "
            "training.batch_stages for these steps, or give a new run another name"
        )


def _longer_rows(trained: list[tuple[int, int]], seq_len: int) -> str:
    """Return the advice to continue with rows of `seq_len`, if these are longer than the last ones."""
    if not trained or seq_len <= trained[-1][0]:
        return ""
    stages = ", ".join(f"{{seq_len: {length}, until_step: {end}}}" for length, end in _ends(trained))
    return (
        f"; to continue with rows of {seq_len}, keep data.seq_len: {trained[0][0]} and set data.stages: "
        f"[{stages}, {{seq_len: {seq_len}}}]"
    )


def _ends(lengths: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    return zip((length for length, _ in lengths), accumulate(steps for _, steps in lengths), strict=True)


def latest_tag(folder: str) -> str | None:
    """Return the tag named by `latest`, even if its checkpoint is missing; None if `latest` names no tag."""
    try:
        with open(os.path.join(folder, LATEST), encoding="utf-8") as file:
            tag = file.read().strip()
    except (OSError, ValueError):
        return None
    return tag if _TAG.fullmatch(tag) else None


def free_name(path: str) -> str:
    """Return `path`, or if it exists the first unused one of `path-2`, `path-3` and so on."""
    names = (path, *(f"{path}-{number}" for number in range(2, 10_000)))
    return next(name for name in names if not os.path.lexists(name))


def _difference(then: Any, now: Any) -> str:
    if not isinstance(then, dict):
        return f"{then}, not {now}"
    return ", ".join(f"{k} {then.get(k)}, not {now.get(k)}" for k in {**then, **now} if then.get(k) != now.get(k))
