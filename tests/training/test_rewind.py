"""The checkpoints from which a run with `rewind_to` resumes: earlier ones once, and after that its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from llama_ds.checkpoint import store
from llama_ds.checkpoint.attempt import SaveAttempt, new_id
from llama_ds.checkpoint.manifest import DESCRIPTION, Description, _canonical, _checksum_of, describe
from llama_ds.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SkipConfig,
    SourceConfig,
    TrainingConfig,
)
from llama_ds.data.mixture import DataState
from llama_ds.data.order import Segment
from llama_ds.data.skips import Skip
from llama_ds.training.rewind import choice, rewinds

Skipped = Sequence[tuple[int, int]]


def run_of(to: int, skip: Skipped = (), number: int = 0) -> RunConfig:
    data = DataConfig("t", 10, (SourceConfig("a", "a", 1.0),), (), tuple(SkipConfig(*one) for one in skip))
    training = TrainingConfig(8, 100, 8000)
    checkpoint = CheckpointConfig(rewind_to=to, rewind_id=number)
    shape = ModelConfig(6, 4, 6, 1, 2, 2, 2)
    return RunConfig(
        "r", 0, "runs", shape, data, training, OptimizerConfig(1e-3), ParallelConfig(), checkpoint=checkpoint
    )


def write(folder: Path, step: int, made: list[dict[str, int]], skipped: Skipped = ()) -> None:
    """Write the parts of a checkpoint that `choice` reads, and point `latest` to it."""
    state = DataState({"a": 5}, (Segment(0, {"a": 1.0}, {"a": (50,)}),), (), tuple(Skip(*one) for one in skipped))
    found = Description(step, 0, 0, "fp32", {}, {}, state.as_json(), step, rewinds=made)
    content: dict[str, Any] = json.loads(json.dumps(asdict(found)))
    content["checksum"] = _checksum_of(_canonical(content))
    (folder / store.tag_of(step)).mkdir()
    (folder / store.tag_of(step) / DESCRIPTION).write_text(json.dumps(content))
    (folder / store.LATEST).write_text(store.tag_of(step))


def begin(folder: Path) -> SaveAttempt:
    attempt = SaveAttempt(str(folder), new_id())
    attempt.begin()
    return attempt


def seen(folder: Path, run: RunConfig) -> tuple[list[int], list[int]]:
    found = choice(str(folder), run)
    return [store.step_of(tag) for tag in found.tags], [store.step_of(tag) for tag in found.aside]


def go_back(folder: Path, run: RunConfig) -> list[dict[str, int]]:
    """Rewind as a starting run does; return the rewinds that it saves."""
    found = choice(str(folder), run)
    if found.aside:
        begin(folder).go_back(found.tags[0], found.aside)
    return rewinds(run, describe(str(folder / found.tags[0])))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 2, 4, 6, 8 of a run without rewinds."""
    for step in (2, 4, 6, 8):
        write(tmp_path, step, [])
    return tmp_path


@pytest.mark.parametrize(
    ("to", "tags", "aside"),
    [
        (0, [8, 6, 4, 2], []),
        (1, [], [8, 6, 4, 2]),
        (4, [4, 2], [8, 6]),
        (5, [4, 2], [8, 6]),
        (8, [8, 6, 4, 2], []),
        (50, [8, 6, 4, 2], []),
    ],
)
def test_a_run_goes_back_to_the_newest_at_or_before_the_step(
    folder: Path, to: int, tags: list[int], aside: list[int]
) -> None:
    assert seen(folder, run_of(to)) == (tags, aside)


def test_without_checkpoints_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    assert seen(tmp_path, run_of(4)) == ([], []) == seen(tmp_path / "absent", run_of(4))
    assert rewinds(run_of(4), None) == [{"to": 4, "id": 0}]  # its saves count as written after the rewind


def test_the_same_command_goes_back_once(folder: Path) -> None:
    """A supervisor restarts the run with the same command; otherwise it would repeat the same steps forever."""
    run = run_of(4, [(4, 2)])
    made = go_back(folder, run)
    assert made == [{"to": 4, "id": 0}]
    assert seen(folder, run) == ([4, 2], [])  # before its first save
    write(folder, 6, made, [(4, 2)])
    assert seen(folder, run) == ([6, 4, 2], [])
    assert go_back(folder, run) == made
    write(folder, 8, made, [(4, 2)])
    assert seen(folder, run) == ([8, 6, 4, 2], [])
    assert seen(folder, run_of(4, [(4, 2), (20, 1)])) == ([8, 6, 4, 2], [])  # skips of later steps may change
    assert seen(folder, run_of(0)) == ([8, 6, 4, 2], [])
    assert rewinds(run_of(0), describe(str(folder / store.tag_of(8)))) == made  # the rewind stays recorded


@pytest.mark.parametrize("again", [run_of(4, [(4, 3)]), run_of(4, [(4, 2)], 1), run_of(4, [(2, 1), (4, 2)])])
def test_another_skip_or_another_id_is_another_rewind(folder: Path, again: RunConfig) -> None:
    """If the spike recurs, a longer window must be skipped, or the same rewind tried again."""
    made = go_back(folder, run_of(4, [(4, 2)]))
    for step in (6, 8):
        write(folder, step, made, [(4, 2)])
    assert seen(folder, again) == ([4, 2], [8, 6])


def test_a_second_rewind_remembers_the_first(folder: Path) -> None:
    made = go_back(folder, run_of(4, [(4, 2)]))
    for step in (6, 8):
        write(folder, step, made, [(4, 2)])
    second = run_of(6, [(4, 2), (6, 3)])
    assert seen(folder, second) == ([6, 4, 2], [8])
    made = go_back(folder, second)
    assert made == [{"to": 4, "id": 0}, {"to": 6, "id": 0}]
    write(folder, 8, made, [(4, 2), (6, 3)])
    assert seen(folder, second) == ([8, 6, 4, 2], [])
    assert seen(folder, run_of(4, [(4, 2)])) == ([8, 6, 4, 2], [])


def test_a_rewind_that_was_cut_short_is_finished(folder: Path) -> None:
    """`latest` was moved and one of two checkpoints set aside; then the run was resumed without the override."""
    begin(folder).go_back(store.tag_of(4), [store.tag_of(8)])
    assert seen(folder, run_of(4)) == ([4, 2], [6])
    write(folder, 8, [])
    assert seen(folder, run_of(4)) == ([4, 2], [8, 6])


def test_what_others_left_is_set_aside_beside_what_is_beyond(folder: Path) -> None:
    write(folder, 10, [{"to": 4, "id": 0}])
    assert seen(folder, run_of(4)) == ([10, 4, 2], [8, 6])


def test_latest_is_heard_among_the_earlier_ones(folder: Path) -> None:
    """Otherwise a run that was reset by hand would resume from the newer checkpoint."""
    (folder / store.LATEST).write_text(store.tag_of(2))
    assert seen(folder, run_of(4)) == ([2, 4], [8, 6])


def test_a_description_that_is_damaged_is_reported_and_not_passed_over(folder: Path) -> None:
    """If the newest checkpoint after a rewind is damaged, the run must report it and use the one before."""
    made = go_back(folder, run_of(4))
    for step in (6, 8):
        write(folder, step, made)
    (folder / store.tag_of(8) / DESCRIPTION).write_text("{}")
    assert seen(folder, run_of(4)) == ([8, 6, 4, 2], [])
    (folder / store.tag_of(6) / DESCRIPTION).write_text("{}")
    assert seen(folder, run_of(4)) == ([4, 2], [8, 6])
