"""A run that is started twice: one start continues, the other fails with an error, and no checkpoint is lost."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llama_ds.checkpoint import store
from llama_ds.checkpoint.attempt import SaveAttempt, new_id
from llama_ds.checkpoint.manifest import DESCRIPTION, Description, _canonical, _checksum_of
from llama_ds.checkpoint.snapshot import HostMemory
from llama_ds.config.run_file import resolved
from llama_ds.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout
from llama_ds.parallel.world import RankInfo
from llama_ds.training.checkpoints import Checkpoints


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    shape, data = ModelConfig(6, 4, 6, 1, 2, 2, 2), DataConfig("any", 8, (SourceConfig("any", "any", 1.0),))
    training = TrainingConfig(4, 100, 3200)
    return RunConfig("r", 0, str(tmp_path), shape, data, training, OptimizerConfig(1e-3), ParallelConfig())


def start(run: RunConfig) -> Checkpoints:
    return Checkpoints(run, resolve_layout(run, 1), "fp32", RankInfo(0, 1, 0))


def description(run: RunConfig, step: int) -> Description:
    return Description(step, 32 * step, 0, "fp32", {"tp": 1}, resolved(run), optimizer_steps=step)


def commit(attempt: SaveAttempt, run: RunConfig, step: int, tokens: int = 0) -> None:
    """Commit a checkpoint with the files that a starting run reads."""
    content = json.loads(json.dumps(asdict(replace(description(run, step), tokens=tokens))))
    content["checksum"] = _checksum_of(_canonical(content))
    os.mkdir(attempt.partial(step))
    Path(attempt.partial(step), DESCRIPTION).write_text(json.dumps(content))
    attempt.publish(step)


@pytest.fixture
def running(run: RunConfig) -> SaveAttempt:
    """The attempt of a start that has saved step 2 and is still running."""
    attempt = SaveAttempt(start(run).folder, new_id())
    attempt.begin()
    commit(attempt, run, 2)
    return attempt


def test_a_start_ends_the_one_before_it(run: RunConfig, running: SaveAttempt) -> None:
    """Otherwise starts would overwrite each other, or the first would train on and lose every checkpoint."""
    first, second = start(run), start(run)
    for one in (first, second):
        found = one.choose()
        assert found and found[0] == store.tag_of(2)
        one.begin()
    first._writer.start(description(run, 3), HostMemory().take([], []))
    with pytest.raises(UserError, match="no longer exists, because another start of this run has taken over"):
        first.settle()
    second.close()
    assert set(os.listdir(first.folder)) == {store.LATEST, store.tag_of(2)}


@pytest.mark.parametrize(("step", "tokens"), [(3, 0), (2, 1)], ids=["another step", "the same step again"])
def test_what_is_committed_while_a_run_starts_is_not_passed_over(
    run: RunConfig, running: SaveAttempt, step: int, tokens: int
) -> None:
    """Otherwise the run would resume from an outdated checkpoint and replace newer ones."""
    late = start(run)
    assert late.choose()
    commit(running, run, step, tokens)
    with pytest.raises(UserError, match="another start of this run has changed its checkpoints"):
        late.begin()
    running.check()  # the running start is not affected
    again = start(run)
    found = again.choose()
    assert found and (found[1].step, found[1].tokens) == (step, tokens)
    again.begin()


@pytest.mark.parametrize("changes", [{"resume": "never"}, {"save": False}, {"save": False, "rewind_to": 1}])
def test_a_start_that_is_refused_or_saves_nothing_leaves_the_other_alone(
    run: RunConfig, running: SaveAttempt, changes: dict[str, object]
) -> None:
    """Otherwise a mistyped command, or a concurrent profile, would stop the running start."""
    commit(running, run, 1)
    damaged = Path(running.folder, store.tag_of(2), DESCRIPTION)
    damaged.write_text("{}")
    running.point_to(store.tag_of(2))
    before = {str(path): path.stat().st_mtime_ns for path in Path(running.folder).rglob("*")}
    other = start(replace(run, checkpoint=CheckpointConfig(**changes)))  # type: ignore[arg-type]
    try:
        other.choose()
        other.begin()
        other.close()
    except UserError as error:
        assert changes["resume"] == "never" and "checkpoint.resume = never" in str(error)
    assert {str(path): path.stat().st_mtime_ns for path in Path(running.folder).rglob("*")} == before
