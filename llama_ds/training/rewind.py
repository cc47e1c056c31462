"""Rewind to an earlier checkpoint once (`checkpoint.rewind_to`); a restart with the same command does not repeat it.

The description of a checkpoint lists the rewinds of the run up to it, and the state of its data the skipped rows. A
checkpoint newer than the step to go back to stays if it was written after this very rewind: it lists the rewind, and
has skipped what `data.skip` demands of the steps before it. All other newer checkpoints are set aside.
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
    """The checkpoints of a folder from the view of a starting run."""

    tags: list[str]  # candidates to resume from, in the order of trying
    aside: list[str]  # checkpoints to set aside, the newest first


def choice(folder: str, run: RunConfig) -> Choice:
    """Return the checkpoints that the run may resume from, and those to set aside before it saves."""
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
    """Return the rewinds up to the chosen checkpoint, with the one that the run is asked for."""
    made, asked = chosen.rewinds if chosen else [], _asked(run)
    return [*made, asked] if run.checkpoint.rewind_to and asked not in made else made


def _asked(run: RunConfig) -> dict[str, int]:
    return {"to": run.checkpoint.rewind_to, "id": run.checkpoint.rewind_id}


def _is_beyond(folder: str, tag: str, run: RunConfig) -> bool | None:
    """Tell whether a checkpoint was written after this rewind; None if it cannot be read."""
    place = os.path.join(folder, tag)
    try:
        found = describe(place)
        made = state_from_json(found.data, place).skips
    except UserError:
        return None
    return _asked(run) in found.rewinds and not unmade(planned_skips(run.data), made, found.step)
