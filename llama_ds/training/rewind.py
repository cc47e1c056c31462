"""Going back to an earlier checkpoint (`checkpoint.rewind_to`), once: a restart with the same command goes on instead.

A checkpoint says in its description which rewinds the run made on its way to it, and in the state of its data what it
passed over. One that is newer than the step to go back to stays if it is beyond this very rewind: it names it, and has
passed over what `data.skip` says of the steps before it. All other newer ones are to be set aside.
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
    """The checkpoints of a folder, as a run that starts sees them."""

    tags: list[str]  # to go on from, in the order in which to try them
    aside: list[str]  # that nobody is to go on from any more, the newest first


def choice(folder: str, run: RunConfig) -> Choice:
    """Return what the run may go on from, and what it has to set aside before it saves."""
    to, candidates = run.checkpoint.rewind_to, store.candidates(folder)
    if not to:
        return Choice(candidates, [])
    newer = [tag for tag in store.tags(folder) if store.step_of(tag) > to]
    beyond = {tag: _is_beyond(folder, tag, run) for tag in newer}
    if any(beyond.values()):  # one that cannot be read is among the candidates, to be reported as damaged
        aside = [tag for tag in newer if beyond[tag] is False]
        return Choice([tag for tag in candidates if tag not in aside], aside)
    return Choice([tag for tag in candidates if store.step_of(tag) <= to], newer)


def rewinds(run: RunConfig, chosen: Description | None) -> list[dict[str, int]]:
    """Return the rewinds on the way of a run that goes on from a checkpoint, with the one that it is asked for."""
    made, asked = chosen.rewinds if chosen else [], _asked(run)
    return [*made, asked] if run.checkpoint.rewind_to and asked not in made else made


def _asked(run: RunConfig) -> dict[str, int]:
    return {"to": run.checkpoint.rewind_to, "id": run.checkpoint.rewind_id}


def _is_beyond(folder: str, tag: str, run: RunConfig) -> bool | None:
    """Return whether a checkpoint is of the run after this rewind; None where it cannot be told."""
    place = os.path.join(folder, tag)
    try:
        found = describe(place)
        made = state_from_json(found.data, place).skips
    except UserError:
        return None
    return _asked(run) in found.rewinds and not unmade(planned_skips(run.data), made, found.step)
