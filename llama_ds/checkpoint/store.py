"""The run's folder of checkpoints: one folder for each saved step, the newest named by `latest`.

Names: `step_00000100` is a complete checkpoint. With a suffix it was set aside: `.damaged` was found so, `.rewound` is
newer than a step that the run was told to go back to. `attempt_0123456789abcdef` belongs to one start of the run's
ranks (`llama_ds.checkpoint.attempt`): it holds the checkpoint that is being written, and those on their way out,
`.replaced` and `.removed`. Earlier versions had these two, and the one being written as `.partial`, beside the others.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import reduce
from typing import Any

from llama_ds.checkpoint.manifest import DESCRIPTION, Description
from llama_ds.errors import UserError

LATEST = "latest"
DAMAGED, REWOUND, REPLACED, REMOVED = ".damaged", ".rewound", ".replaced", ".removed"
ATTEMPT = "attempt_"
_TAG = re.compile(r"step_(\d{8,})")
_SET_ASIDE = re.compile(rf"{_TAG.pattern}(\.damaged|\.rewound)(-\d+)?")
_LEFTOVER = re.compile(rf"{ATTEMPT}[0-9a-f]{{16}}|{_TAG.pattern}\.(partial|replaced|removed)[\d-]*|{LATEST}\.tmp")


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


def is_leftover(name: str) -> bool:
    """Return whether a name in the folder is that of an attempt, or of what an earlier version left of a save."""
    return bool(_LEFTOVER.fullmatch(name))


def is_set_aside(name: str) -> bool:
    """Return whether a name is that of a checkpoint that was set aside, to be kept."""
    return bool(_SET_ASIDE.fullmatch(name))


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
    latest = named(folder)
    return latest if latest in complete else next(iter(complete), None)


def candidates(folder: str) -> list[str]:
    """Return the tags to go on from, in the order in which to try them: what `latest` names, then the newest first.

    What it names is there even where nothing else is: its absence is damage, not a run that never saved.
    """
    latest = named(folder)
    others = [tag for tag in tags(folder) if tag != latest]
    return [latest, *others] if latest else others


def outlived(folder: str) -> list[str]:
    """Return the rewound checkpoints of earlier steps than that of `latest`."""
    latest = named(folder)
    rewound = [n for n in os.listdir(folder) if re.fullmatch(rf"{_TAG.pattern}{re.escape(REWOUND)}[\d-]*", n)]
    return sorted(name for name in rewound if latest and step_of(name) < step_of(latest))


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


def named(folder: str) -> str | None:
    """Return the tag that `latest` names, whether it is there or not; None where there is no such name."""
    try:
        with open(os.path.join(folder, LATEST), encoding="utf-8") as file:
            tag = file.read().strip()
    except (OSError, ValueError):
        return None
    return tag if _TAG.fullmatch(tag) else None


def free_name(path: str) -> str:
    """Return `path`, or where it is taken the first of `path-2`, `path-3` ... that is not."""
    names = (path, *(f"{path}-{number}" for number in range(2, 10_000)))
    return next(name for name in names if not os.path.lexists(name))


def _difference(then: Any, now: Any) -> str:
    if not isinstance(then, dict):
        return f"{then}, not {now}"
    return ", ".join(f"{k} {then.get(k)}, not {now.get(k)}" for k in {**then, **now} if then.get(k) != now.get(k))
