"""The data mixture of a run by step: the plan of the run file, and the history that a resumed run continues.

The data state of a run is its step and this history, `DataState`: small, readable, and saved with every checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llama_ds.atomic_files import write_atomically
from llama_ds.config.batch_stages import Batches
from llama_ds.config.reader import ConfigSource, read
from llama_ds.config.schema import DataConfig
from llama_ds.data.order import BadShard, Order, Segment
from llama_ds.data.skips import Skip, unmade
from llama_ds.data.source.manifest import MANY, Split
from llama_ds.errors import UserError
from llama_ds.log import logger

STATE = "data.json"  # file in the run folder
LISTED = "its manifest lists it as damaged"
REBUILT = "bring the old shards back, give the new ones another source name, or start a new run"


@dataclass(frozen=True)
class DataState:
    """All past and planned mixtures, replaced shards and skips of a run, by step."""

    rows_per_shard: dict[str, int]  # for every source that the run has ever read
    segments: tuple[Segment, ...]
    bad: tuple[BadShard, ...] = ()
    skips: tuple[Skip, ...] = ()
    contents: dict[str, tuple[str, ...]] = field(default_factory=dict)  # digest of each extent of each source

    def order(self, seed: int, batches: Batches | int) -> Order:
        """Return the row order of a run with this history, and with these rows of each step or of every step."""
        return Order(seed, batches, self.rows_per_shard, self.segments, self.bad, self.skips)

    def as_json(self) -> dict[str, Any]:
        """Return the state as JSON data."""
        return asdict(self)


def state_from_json(raw: dict[str, Any], source: str) -> DataState:
    """Return the state from the JSON data of `as_json`.

    Raises:
        UserError: `raw` is not a data state; the message names `source`, where it was read from.
    """
    try:
        state = read(DataState, raw, ConfigSource(source))  # older checkpoints lack `skips` and have none
        _check(state)
        state.order(seed=0, batches=1)  # raises an error if the parts contradict each other
    except (UserError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"{source}: ")
        raise UserError(
            f"{source}: holds no state of the data ({reason}); it was written by another version, or is damaged"
        ) from None
    return state


def _check(state: DataState) -> None:
    """Raise ValueError for numbers that no run writes."""
    rows = [n for segment in state.segments for extent in segment.extents.values() for n in extent]
    counts = [*rows, *(segment.step for segment in state.segments)]
    counts += [n for bad in state.bad for n in (bad.step, bad.shard)]
    counts += [n for skip in state.skips for n in (skip.step, skip.steps)]
    if not all(0 <= n < MANY for n in counts) or not all(0 < n < MANY for n in state.rows_per_shard.values()):
        raise ValueError("a number is negative or too large")
    if unknown := {bad.source for bad in state.bad} - set(state.rows_per_shard):
        raise ValueError(f"bad names the unknown source {min(unknown)}")


def save_state(path: str, state: DataState) -> None:
    """Write the state to a file atomically."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_atomically(path, json.dumps(state.as_json(), indent=1), durable=True)


def planned(data: DataConfig, batches: Batches | int, geometry: Mapping[str, Split]) -> DataState:
    """Return the state of a run that follows its run file from the first step to the last.

    batches: the rows of each step, or of every step. geometry: the training split of every source by name. A stage of
    `data.mixture` starts at the first step at which `at_tokens` tokens have been read. Shards that a manifest lists as
    damaged are replaced from the start.
    """
    weights = {source.name: source.weight for source in data.sources}
    extents = {name: tuple(extent.rows for extent in split.extents) for name, split in geometry.items()}
    segments = [Segment(0, weights, extents)]
    for stage in data.mixture:
        step = (Batches((batches,)) if isinstance(batches, int) else batches).steps_for(
            -(-stage.at_tokens // data.seq_len)
        )
        segments.append(Segment(step, {name: stage.weights.get(name, 0.0) for name in weights}, extents))
    bad = tuple(BadShard(0, name, shard, LISTED) for name, split in geometry.items() for shard in split.bad)
    rows_per_shard = {name: split.rows_per_shard for name, split in geometry.items()}
    contents = {name: tuple(extent.sha256 for extent in split.extents) for name, split in geometry.items()}
    return DataState(rows_per_shard, tuple(segments), bad, planned_skips(data), contents)


def planned_skips(data: DataConfig) -> tuple[Skip, ...]:
    """Return the skips that the run file requests."""
    return tuple(Skip(skip.at_step, skip.steps) for skip in data.skip)


def continued(past: DataState, plan: DataState, step: int, checkpoint: str, reread: Collection[str] = ()) -> DataState:
    """Return the state of a run that resumes at `step`: its unchanged past, followed by the plan of the run file.

    `reread` names the new sources that may hold rows which the run has read.

    Raises:
        UserError: a source was rebuilt or renamed, or the run file requests past skips that the run did not make; the
            message names `checkpoint`.
    """
    kept = [segment for segment in past.segments if segment.step < step]
    _check_new_sources(kept, past, plan, checkpoint, reread)
    check_same_sources({name for segment in kept for name in segment.extents}, kept, past, plan, checkpoint)
    now = next(segment for segment in reversed(plan.segments) if segment.step <= step)
    stage_starts = now.step == step  # even a stage with unchanged weights starts a segment
    if not kept or stage_starts or (kept[-1].weights, kept[-1].extents) != (now.weights, now.extents):
        kept.append(Segment(step, now.weights, now.extents))
    later = (segment for segment in plan.segments if segment.step > step)
    known = {(bad.source, bad.shard) for bad in past.bad}
    listed = (replace(bad, step=step) for bad in plan.bad if (bad.source, bad.shard) not in known)
    rows_per_shard = {**past.rows_per_shard, **plan.rows_per_shard}
    skips = _continued_skips(past.skips, plan.skips, step, checkpoint)
    contents = {**past.contents, **plan.contents}
    return DataState(rows_per_shard, (*kept, *later), (*past.bad, *listed), skips, contents)


def lengthened(past: DataState, plan: DataState, step: int, checkpoint: str) -> DataState:
    """Return the state of a run whose rows change their length at `step`: the plan of the run file, with past skips.

    Rows of another length are other rows, in shards of their own.

    Raises:
        UserError: the run file requests past skips that the run did not make.
    """
    return replace(plan, skips=_continued_skips(past.skips, plan.skips, step, checkpoint))


def check_same_sources(
    names: set[str], segments: Sequence[Segment], past: DataState, now: DataState, where: str
) -> None:
    """Check that the sources `names` still hold what a run has read of them in `segments` of its history `past`.

    A source that is absent in `now`, the plan for the present sources, is not checked.

    Raises:
        UserError: a source was rebuilt; the message names `where`, the checkpoint or state of the run.
    """
    _check_same_rows(names, segments, past.rows_per_shard, now, where)
    _check_same_content(names, past, now.contents, where)


def _check_new_sources(
    kept: Sequence[Segment], past: DataState, plan: DataState, checkpoint: str, reread: Collection[str]
) -> None:
    """Refuse a source that is new to the run, but holds shards that it has read: a renamed source would start anew."""
    read_ones = {name for segment in kept for name, weight in segment.weights.items() if weight}
    for name in sorted(plan.contents.keys() - past.rows_per_shard.keys()):
        digests = {digest for digest in plan.contents[name] if digest}
        again = sorted(old for old in read_ones if digests & set(past.contents.get(old, ())))
        if again and name not in reread:
            listed = "" if again[0] in plan.contents else ", which the run file no longer lists,"
            raise UserError(
                f"{checkpoint}: source {name} is new to the run, and holds shards that it has read as source "
                f"{again[0]}{listed} so their rows would come again from the first one on; call the source {again[0]}, "
                "or set its reread: true"
            )
        unknown = sorted(old for old in read_ones - plan.contents.keys() if not all(past.contents.get(old, ("",))))
        unsure = f"; {checkpoint} records no digest of {', '.join(unknown)}: check that it is not one of these"
        logger.info("source %s is new to the run: its first row comes next%s", name, unsure if unknown else "")


def _check_same_content(names: set[str], past: DataState, now: Mapping[str, tuple[str, ...]], where: str) -> None:
    # For a source without digests, only a log line says that.
    for name in sorted(names & set(now)):
        then = past.contents.get(name, ())
        if not (then and all(then) and all(now[name][: len(then)])):
            logger.info("%s: records no digest of source %s; whether it was rebuilt cannot be checked", where, name)
        elif now[name][: len(then)] != then:
            extent = next(i for i, digest in enumerate(then) if now[name][i : i + 1] != (digest,))
            here = now[name][extent][:12] if extent < len(now[name]) else "missing"
            raise UserError(
                f"{where}: has read source {name} with digest {then[extent][:12]} of its shards, which is now {here}: "
                f"it was rebuilt, not added to; {REBUILT}"
            )


def _continued_skips(past: tuple[Skip, ...], plan: tuple[Skip, ...], step: int, checkpoint: str) -> tuple[Skip, ...]:
    made = tuple(skip for skip in past if skip.step < step)
    for skip in unmade(plan, made, step):
        then = next((f"{s.steps} steps" for s in made if s.step == skip.step), "nothing")
        back = f"go back there with checkpoint.rewind_to={skip.step}, or " if skip.step else ""
        raise UserError(
            f"{checkpoint}: is at step {step} and has skipped {then} at step {skip.step}, where data.skip requests "
            f"{skip.steps}; {back}skip at step {step} or later"
        )
    return (*made, *(skip for skip in plan if skip.step >= step))


def _check_same_rows(
    names: set[str], segments: Sequence[Segment], rows_per_shard: Mapping[str, int], plan: DataState, where: str
) -> None:
    now = plan.segments[-1].extents
    for segment in segments:
        for name, rows in segment.extents.items():
            if name not in names or name not in now:
                continue
            if now[name][: len(rows)] != rows or plan.rows_per_shard[name] != rows_per_shard[name]:
                then, here = (f"{' + '.join(map(str, r))} rows" for r in (rows, now[name]))
                raise UserError(
                    f"{where}: has read source {name} of {then}, {rows_per_shard[name]} in a shard, which now has "
                    f"{here}, {plan.rows_per_shard[name]} in a shard: it was rebuilt, not added to; {REBUILT}"
                )
