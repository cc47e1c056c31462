"""Rewind to an earlier checkpoint once (`checkpoint.rewind_to`); a restart with the same command does not repeat it.

The description of a checkpoint lists the run's earlier rewinds, and its data state lists the skipped rows. A checkpoint
newer than the rewind step stays if it was written after this rewind: it lists the rewind, and it has skipped what
`data.skip` requires for the steps before it. All other newer checkpoints are set aside.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from llama_ds.checkpoint import store
from llama_ds.checkpoint.manifest import Description, describe
from llama_ds.config.schema import RunConfig
from llama_ds.data.mixture import planned_skips, state_from_json
from llama_ds.data.skips import unmade
from llama_ds.errors import UserError


@dataclass(frozen=True)
class Choice:
    """The checkpoints of a folder as a starting run classifies them."""

    tags: list[str]  # candidates to resume from, in the order in which they are tried
    aside: list[str]  # checkpoints to set aside, newest first


def choice(folder: str, run: RunConfig) -> Choice:
    """Return the checkpoints that the run may resume from, and those to set aside before its first save."""
    to, candidates = run.checkpoint.rewind_to, store.candidates(folder)
    if not to:
        return Choice(candidates, [])
    newer = [tag for tag in store.tags(folder) if store.step_of(tag) > to]
    beyond = {tag: _is_beyond(folder, tag, run) for tag in newer}
    if any(beyond.values()):  # unreadable ones (None) stay candidates, to be reported as damaged
        aside = [tag for tag in newer if beyond[tag] is False]
        return Choice([tag for tag in candidates if tag not in aside], aside)
    return Choice([tag for tag in candidates if store.step_of(tag) <= to], newer)


def rewinds(run: RunConfig, chosen: Description | None) -> list[dict[str, int]]:
    """Return the rewinds up to the chosen checkpoint, plus the requested one."""
    made, requested = chosen.rewinds if chosen else [], _requested(run)
    return [*made, requested] if run.checkpoint.rewind_to and requested not in made else made


def _requested(run: RunConfig) -> dict[str, int]:
    return {"to": run.checkpoint.rewind_to, "id": run.checkpoint.rewind_id}


def _is_beyond(folder: str, tag: str, run: RunConfig) -> bool | None:
    """Return whether a checkpoint was written after this rewind; None if it cannot be read."""
    path = os.path.join(folder, tag)
    try:
        found = describe(path)
        made = state_from_json(found.data, path).skips
    except UserError:
        return None
    return _requested(run) in found.rewinds and not unmade(planned_skips(run.data), made, found.step)
