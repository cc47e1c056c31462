"""What a run mixes, by step: the run file's plan, and the history that a run carries on when it resumes.

The state of a run's data is its step and this history, `DataState`: small, readable, saved with every checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from llama_ds.config.schema import DataConfig
from llama_ds.data.order import BadShard, Order, Segment
from llama_ds.data.skips import Skip, unmade
from llama_ds.data.source.manifest import Split, write_whole
from llama_ds.errors import UserError

STATE = "data.json"  # in a run's folder
LISTED = "its manifest lists it as damaged"


@dataclass(frozen=True)
class DataState:
    """Every mixture of a run so far and to come, the shards that it replaces and what it skips, by step."""

    rows_per_shard: dict[str, int]  # of every source that was ever read
    segments: tuple[Segment, ...]
    bad: tuple[BadShard, ...] = ()
    skips: tuple[Skip, ...] = ()

    def order(self, seed: int, global_batch: int) -> Order:
        """Return the order in which a run of this history reads."""
        return Order(seed, global_batch, self.rows_per_shard, self.segments, self.bad, self.skips)

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def state_from_json(raw: dict[str, Any], place: str) -> DataState:
    """Return the state that `as_json` wrote.

    Raises:
        UserError: it is not one; `place` says where it came from.
    """
    try:
        segments = tuple(
            Segment(s["step"], s["weights"], {name: tuple(rows) for name, rows in s["extents"].items()})
            for s in raw["segments"]
        )
        skips = tuple(Skip(**skip) for skip in raw.get("skips", ()))  # a checkpoint without the key knew of none
        return DataState(raw["rows_per_shard"], segments, tuple(BadShard(**bad) for bad in raw["bad"]), skips)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place}: holds no state of the data ({type(error).__name__}: {error}); it was written by another version"
        ) from None


def save_state(path: str, state: DataState) -> None:
    """Write the state to a file that is there whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_whole(path, json.dumps(state.as_json(), indent=1).encode())


def planned(data: DataConfig, tokens_per_step: int, geometry: Mapping[str, Split]) -> DataState:
    """Return the state of a run that follows its run file from its first step to its last.

    geometry: the training split of every source by name. A stage of `data.mixture` begins with the first step at which
    `at_tokens` tokens have been read. Shards that a manifest calls damaged are replaced from the start.
    """
    weights = {source.name: source.weight for source in data.sources}
    extents = {name: tuple(extent.rows for extent in split.extents) for name, split in geometry.items()}
    segments = [Segment(0, weights, extents)]
    for stage in data.mixture:
        step = -(-stage.at_tokens // tokens_per_step)
        segments.append(Segment(step, {name: stage.weights.get(name, 0.0) for name in weights}, extents))
    bad = tuple(BadShard(0, name, shard, LISTED) for name, split in geometry.items() for shard in split.bad)
    rows_per_shard = {name: split.rows_per_shard for name, split in geometry.items()}
    return DataState(rows_per_shard, tuple(segments), bad, planned_skips(data))


def planned_skips(data: DataConfig) -> tuple[Skip, ...]:
    """Return what the run file would have the run pass over."""
    return tuple(Skip(skip.at_step, skip.steps) for skip in data.skip)


def continued(past: DataState, plan: DataState, step: int, place: str) -> DataState:
    """Return the state of a run that resumes at `step`: its past as it was, from there on the run file's plan.

    Raises:
        UserError: a source has other rows than the run read, or the run file skips in the past what the run did not;
            `place` names the checkpoint.
    """
    kept = [segment for segment in past.segments if segment.step < step]
    _check_rows_are_the_same(kept, past.rows_per_shard, plan, place)
    now = next(segment for segment in reversed(plan.segments) if segment.step <= step)
    begins = now.step == step  # a stage does, also one that changes no weight
    if not kept or begins or (kept[-1].weights, kept[-1].extents) != (now.weights, now.extents):
        kept.append(Segment(step, now.weights, now.extents))
    later = (segment for segment in plan.segments if segment.step > step)
    known = {(bad.source, bad.shard) for bad in past.bad}
    listed = (replace(bad, step=step) for bad in plan.bad if (bad.source, bad.shard) not in known)
    rows_per_shard = {**past.rows_per_shard, **plan.rows_per_shard}
    skips = _continued_skips(past.skips, plan.skips, step, place)
    return DataState(rows_per_shard, (*kept, *later), (*past.bad, *listed), skips)


def _continued_skips(past: tuple[Skip, ...], plan: tuple[Skip, ...], step: int, place: str) -> tuple[Skip, ...]:
    made = tuple(skip for skip in past if skip.step < step)
    for skip in unmade(plan, made, step):
        then = next((f"{s.steps} steps" for s in made if s.step == skip.step), "nothing")
        back = f"go back there with checkpoint.rewind_to={skip.step}, or " if skip.step else ""
        raise UserError(
            f"{place}: is at step {step} and has passed over {then} at step {skip.step}, where data.skip says "
            f"{skip.steps}; {back}skip at step {step} or later"
        )
    return (*made, *(skip for skip in plan if skip.step >= step))


def _check_rows_are_the_same(kept: list[Segment], rows_per_shard: dict[str, int], plan: DataState, place: str) -> None:
    now = plan.segments[-1].extents
    for segment in kept:
        for name, rows in segment.extents.items():
            if name not in now:
                continue
            if now[name][: len(rows)] != rows or plan.rows_per_shard[name] != rows_per_shard[name]:
                then, here = (f"{' + '.join(map(str, r))} rows" for r in (rows, now[name]))
                raise UserError(
                    f"{place}: has read source {name} of {then}, {rows_per_shard[name]} in a shard, which now has "
                    f"{here}, {plan.rows_per_shard[name]} in a shard: it was rebuilt, not added to; bring the "
                    "old shards back, give the new ones another source name, or start a new run"
                )
