"""The run's folder of checkpoints: one folder for each saved step, the newest named by `latest`.

Names: `step_00000100` is a whole checkpoint. A suffix says that it is none, or none any more: `.partial` was never
committed, `.damaged` was found so, `.rewound` is newer than a step that the run was told to go back to, `.replaced` and
`.removed` are on their way out.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from functools import reduce
from typing import Any

from llama_ds.checkpoint.manifest import DESCRIPTION, Description, sync, write_durably
from llama_ds.errors import UserError
from llama_ds.log import logger

LATEST = "latest"
PARTIAL, DAMAGED, REWOUND, REPLACED, REMOVED = ".partial", ".damaged", ".rewound", ".replaced", ".removed"
_TAG = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is there: the newest `last`, and those of every `every`-th step.

    Where not all stay, one that was rewound stays until the run has saved a later step than its.
    """

    last: int = 0  # 0: all
    every: int = 0  # 0: none beside them


def tag_of(step: int) -> str:
    """Return the tag (folder name) of the checkpoint of `step`."""
    return f"step_{step:08d}"


def step_of(tag: str) -> int:
    """Return the step of a tag, also of one with a suffix."""
    match = _TAG.match(tag)
    assert match
    return int(match[1])


def partial_of(step: int) -> str:
    """Return the name of a checkpoint's folder while it is written."""
    return tag_of(step) + PARTIAL


def tags(folder: str) -> list[str]:
    """Return the tags of a folder's whole checkpoints, the newest first."""
    if not os.path.isdir(folder):
        return []
    found = [name for name in os.listdir(folder) if _TAG.fullmatch(name)]
    complete = [name for name in found if os.path.lexists(os.path.join(folder, name, DESCRIPTION))]
    return sorted(complete, key=step_of, reverse=True)


def newest(folder: str) -> str | None:
    """Return the tag that `latest` names, or where it names none that is there the newest; None where there is none."""
    complete = tags(folder)
    named = _named(folder)
    return named if named in complete else next(iter(complete), None)


def candidates(folder: str) -> list[str]:
    """Return the tags to go on from, in the order in which to try them: what `latest` names, then the newest first.

    What it names is there even where nothing else is: its absence is damage, not a run that never saved.
    """
    named = _named(folder)
    others = [tag for tag in tags(folder) if tag != named]
    return [named, *others] if named else others


def publish(folder: str, step: int) -> None:
    """Make the partial checkpoint of `step`, whose every file is on the disk, a whole one, and the newest."""
    tag = os.path.join(folder, tag_of(step))
    if os.path.lexists(tag):  # left by a run that went back to an earlier step; `latest` does not name it
        os.rename(tag, _free_name(tag + REPLACED))
    os.rename(tag + PARTIAL, tag)
    sync(folder)
    point_to(folder, tag_of(step))


def point_to(folder: str, tag: str) -> None:
    """Make `latest` name `tag`, atomically."""
    write_durably(os.path.join(folder, LATEST), tag)


def go_back(folder: str, tag: str, newer: list[str]) -> None:
    """Make `tag` the newest, and set the whole checkpoints `newer` aside, so that nobody goes on from them.

    `latest` goes first: cut off before that the run has not gone back, and after it, whatever is set aside, it has.
    """
    point_to(folder, tag)
    for other in newer:
        os.rename(os.path.join(folder, other), _free_name(os.path.join(folder, other) + REWOUND))
    sync(folder)


def set_aside(folder: str, tag: str) -> str:
    """Rename a damaged checkpoint, if it is there, so that nobody takes it for a whole one; return its new name."""
    if not os.path.lexists(os.path.join(folder, tag)):
        return "gone"
    aside = _free_name(os.path.join(folder, tag) + DAMAGED)
    os.rename(os.path.join(folder, tag), aside)
    return os.path.basename(aside)


def clean(folder: str) -> list[str]:
    """Remove what was never committed or is on its way out; return the names of partial checkpoints removed."""
    if not os.path.isdir(folder):
        return []
    gone = []
    for name in sorted(os.listdir(folder)):
        match = re.fullmatch(rf"{_TAG.pattern}(\.[a-z]+)[\d-]*", name)
        if match and match[2] in (PARTIAL, REPLACED, REMOVED):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
            gone += [name] if match[2] == PARTIAL else []
    return gone


def remove_old(folder: str, keep: Retention) -> None:
    """Remove the checkpoints that `keep` does not keep, and those that were replaced. The newest stays in any case."""
    clean(folder)
    if not keep.last:
        return
    named = _named(folder)
    for tag in [tag for tag in tags(folder) if tag != named][max(keep.last - 1, 0) :]:
        if not keep.every or step_of(tag) % keep.every:
            _remove(folder, tag)
    for name in _outlived(folder, named):
        _remove(folder, name)
        logger.info("removed %s/%s: the run that went back has saved a later step", folder, name)


def _outlived(folder: str, named: str | None) -> list[str]:
    """Return the rewound checkpoints of earlier steps than that of `latest`."""
    rewound = [n for n in os.listdir(folder) if re.fullmatch(rf"{_TAG.pattern}{re.escape(REWOUND)}[\d-]*", n)]
    return sorted(name for name in rewound if named and step_of(name) < step_of(named))


def _remove(folder: str, name: str) -> None:
    removed = _free_name(os.path.join(folder, tag_of(step_of(name))) + REMOVED)
    os.rename(os.path.join(folder, name), removed)  # at once, as far as readers are concerned
    shutil.rmtree(removed, ignore_errors=True)


def check_resumable(tag_folder: str, found: Description, run: dict[str, Any]) -> None:
    """Refuse to continue a checkpoint of another model or data order, or one that holds weights only.

    Raises:
        UserError: naming what differs.
    """
    if found.optimizer_steps is None:
        raise UserError(
            f"{tag_folder}: holds weights only, no optimizer, so it is not a run to go on with; "
            "start a run from it with checkpoint.start_from"
        )
    for key in ("model", "seed", "training.global_batch", "data.seq_len"):  # rows are counted by steps of one size
        then, now = (reduce(lambda node, part: node[part], key.split("."), whole) for whole in (found.run, run))
        if then != now:
            raise UserError(
                f"{tag_folder}: was trained with {key} {_difference(then, now)}; "
                "use the same run file, or another name for a new run"
            )


def _named(folder: str) -> str | None:
    try:
        with open(os.path.join(folder, LATEST), encoding="utf-8") as file:
            tag = file.read().strip()
    except (OSError, ValueError):
        return None
    return tag if _TAG.fullmatch(tag) else None


def _free_name(path: str) -> str:
    names = (path, *(f"{path}-{number}" for number in range(2, 10_000)))
    return next(name for name in names if not os.path.lexists(name))


def _difference(then: Any, now: Any) -> str:
    if not isinstance(then, dict):
        return f"{then}, not {now}"
    return ", ".join(f"{k} {then.get(k)}, not {now.get(k)}" for k in {**then, **now} if then.get(k) != now.get(k))
