"""The checkpoint folder: which checkpoint a run resumes from, and what is set aside, deleted or kept."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest
from commit_contents import ONE, SMALL, begin, description, names

from llama_ds.checkpoint import store
from llama_ds.checkpoint.attempt import SaveAttempt, new_id
from llama_ds.checkpoint.manifest import DESCRIPTION, Description
from llama_ds.checkpoint.store import Retention
from llama_ds.errors import UserError


def make(folder: Path, *names: str) -> str:
    """Create folders with an empty description, which count as checkpoints by their names; return their parent."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / DESCRIPTION).touch()
    return str(folder)


def test_an_empty_or_absent_folder_has_no_candidates(tmp_path: Path) -> None:
    """Otherwise a new run could not start."""
    assert store.newest(str(tmp_path / "absent")) is None
    assert store.newest(str(tmp_path)) is None and store.candidates(str(tmp_path)) == []
    assert store.candidates(str(tmp_path / "absent")) == []


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    """Otherwise a run of more than 99999999 steps would resume from an earlier checkpoint."""
    steps = [99_999_999, 7, 100_000_000, 1_000_000_000]
    folder = make(tmp_path, *map(store.tag_of, steps))
    assert store.tags(folder) == ["step_1000000000", "step_100000000", "step_99999999", "step_00000007"]
    assert store.newest(folder) == "step_1000000000"
    attempt = begin(folder)
    attempt.point_to(store.tag_of(1_000_000_000))
    attempt.remove_old(Retention(last=2, every=7))
    assert store.tags(folder) == ["step_1000000000", "step_100000000", "step_00000007"]


def test_only_complete_checkpoints_are_candidates(tmp_path: Path) -> None:
    """Otherwise a run could resume from an incomplete checkpoint, or from a copy of another run's checkpoint."""
    others = ["step_00000005.partial", "step_00000006.damaged", "step_00000007.replaced", "step_00000008.removed-2"]
    others += ["step_9", "step_00000010-mine", "my_step_00000011", "step_00000012.bak", "step_0000001x"]
    folder = make(tmp_path, store.tag_of(4), *others)
    (tmp_path / store.tag_of(13)).mkdir()  # without a description
    (tmp_path / store.tag_of(14)).touch()
    assert store.candidates(folder) == [store.tag_of(4)]


def test_latest_comes_first_and_then_the_newest(tmp_path: Path) -> None:
    """Otherwise a user could not select an earlier checkpoint, or damage to the newest would restart the run."""
    folder = make(tmp_path, *map(store.tag_of, (1, 2, 3, 4)))
    for named in (2, 1, 4):
        begin(folder).point_to(store.tag_of(named))
        rest = [step for step in (4, 3, 2, 1) if step != named]
        assert store.candidates(folder) == [store.tag_of(step) for step in (named, *rest)]
        assert store.newest(folder) == store.tag_of(named)
    assert (tmp_path / "latest").read_text() == store.tag_of(4)


@pytest.mark.parametrize("content", [b"", b"\n", b"..", b"../step_00000001", b"\xff\xfe\0", b"no such tag"])
def test_a_latest_that_names_no_tag_is_none(tmp_path: Path, content: bytes) -> None:
    """Otherwise an invalid `latest` would hide all checkpoints, or a folder elsewhere could be set aside."""
    folder = make(tmp_path, *map(store.tag_of, (1, 2)))
    (tmp_path / "latest").write_bytes(content)
    assert store.candidates(folder) == [store.tag_of(2), store.tag_of(1)]
    (tmp_path / "latest").write_text(store.tag_of(1) + "\n")  # editors append a newline
    assert store.newest(folder) == store.tag_of(1)


def test_a_missing_checkpoint_that_latest_names_is_a_candidate(tmp_path: Path) -> None:
    """Otherwise a run whose newest checkpoint was deleted would silently resume from an older one, or start anew."""
    attempt = begin(str(tmp_path))
    attempt.point_to(store.tag_of(3))
    assert store.newest(str(tmp_path)) is None and store.candidates(str(tmp_path)) == [store.tag_of(3)]
    folder = make(tmp_path, *map(store.tag_of, (1, 2)))
    assert store.newest(folder) == store.tag_of(2)
    assert store.candidates(folder) == [store.tag_of(step) for step in (3, 2, 1)]
    assert attempt.set_aside_damaged(store.tag_of(3)) == "gone"
    assert store.tags(folder) == [store.tag_of(2), store.tag_of(1)]


def test_begin_deletes_only_leftovers(tmp_path: Path) -> None:
    """Otherwise a disk would fill with the leftovers of killed saves, or a user's own folder would be deleted."""
    deleted = ["step_00000005.partial", "step_00000006.replaced", "step_00000006.replaced-2", "step_00000007.removed"]
    deleted += ["attempt_0123456789abcdef"]
    kept = [store.tag_of(4), "step_00000006.damaged", "step_00000006.damaged-2", "step_00000008.mine"]
    kept += ["step_00000005.partial.bak", "old.partial", "step_7.partial", "step_00000009", "attempt_01"]
    folder = make(tmp_path, *deleted, *kept)
    (tmp_path / "latest").write_text(store.tag_of(4))
    (tmp_path / "latest.tmp").touch()  # an earlier version could leave this file
    attempt = SaveAttempt(folder, new_id())
    assert attempt.begin() == sorted([*deleted, "latest.tmp"])
    assert names(attempt) == {*kept, store.LATEST}
    attempt.end()
    assert set(os.listdir(folder)) == {*kept, store.LATEST}
    attempt.end()


def test_damaged_checkpoints_are_set_aside_and_kept(tmp_path: Path) -> None:
    """Users may want to analyse them, and a second one of the same step must not replace the first."""
    folder = make(tmp_path, *map(store.tag_of, (1, 2)))
    attempt, aside = begin(folder), []
    for content in ("first", "second", "third"):
        make(tmp_path, store.tag_of(3))
        (tmp_path / store.tag_of(3) / "weights").write_text(content)
        aside.append(attempt.set_aside_damaged(store.tag_of(3)))
    assert aside == ["step_00000003.damaged", "step_00000003.damaged-2", "step_00000003.damaged-3"]
    assert [(tmp_path / name / "weights").read_text() for name in aside] == ["first", "second", "third"]
    assert store.candidates(folder) == [store.tag_of(2), store.tag_of(1)]
    attempt.point_to(store.tag_of(2))
    attempt.remove_old(Retention(last=1))
    assert names(attempt) == {store.LATEST, store.tag_of(2), *aside}


def test_an_interrupted_removal_is_completed(tmp_path: Path) -> None:
    """Otherwise the leftovers of a killed removal would block the next one, or stay forever."""
    attempt = begin(make(tmp_path, *map(store.tag_of, (1, 2, 3))))
    make(Path(attempt.path), "step_00000001.removed", "step_00000002.removed")
    attempt.point_to(store.tag_of(3))
    attempt.remove_old(Retention(last=1))
    assert names(attempt) == {store.LATEST, store.tag_of(3)}


def test_publishing_replaces_a_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    """Otherwise two checkpoints would be mixed in one folder."""
    folder = make(tmp_path, store.tag_of(3))
    attempt = begin(folder)
    own = Path(make(Path(attempt.path), store.tag_of(3), store.tag_of(3) + store.REPLACED))
    (own / store.tag_of(3) / "new").touch()
    attempt.publish(3)
    assert set(os.listdir(tmp_path / store.tag_of(3))) == {DESCRIPTION, "new"}
    assert store.newest(folder) == store.tag_of(3)
    replaced = {store.tag_of(3) + store.REPLACED, store.tag_of(3) + store.REPLACED + "-2"}
    assert set(os.listdir(own)) == replaced
    assert set(os.listdir(folder)) == {store.LATEST, store.tag_of(3), own.name}


def run_of(found: Description) -> dict[str, object]:
    return {**found.run, "training": {"global_batch": 4, "steps": 2}, "data": {"seq_len": 32}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed 1, not 2"),
        ({"training": {"global_batch": 8}}, "training.global_batch 4, not 8"),
        ({"data": {"seq_len": 64}}, "data.seq_len 32, not 64"),
        ({"optimizer": {"name": "muon"}}, "optimizer.name adamw, not muon"),
        ({"optimizer": {"masters": "bf16_kahan"}}, "optimizer.masters fp32, not bf16_kahan"),
        ({"model": {**asdict(SMALL), "vocab_size": 8, "head_dim": 4}}, "model vocab_size 6, not 8, head_dim 2, not 4"),
    ],
)
def test_another_run_is_refused(change: dict[str, object], message: str) -> None:
    """Otherwise a run could resume with the weights of another model, or read some rows twice and others never."""
    found = description(SMALL, ONE, 1, 2)
    run = run_of(found)
    found.run.update(run)
    store.check_resumable("folder", found, run)
    store.check_resumable("folder", found, {**run, "optimizer": {"lr": 1.0}})
    with pytest.raises(UserError, match=f"^folder: was trained with {message}; use the same run file"):
        store.check_resumable("folder", found, {**run, **change})


def test_a_shorter_run_is_refused() -> None:
    """Otherwise the run would end at once and seem to have finished with its new number of steps."""
    found = description(SMALL, ONE, 1, 2)
    run = run_of(found)
    found.run.update(run)
    with pytest.raises(UserError, match=r"^folder: is at step 2, after the last one of .*training.steps = 1; set more"):
        store.check_resumable("folder", found, {**run, "training": {"global_batch": 4, "steps": 1}})


def test_a_weights_only_checkpoint_cannot_be_resumed() -> None:
    """Otherwise training would silently resume with optimizer states of zero."""
    found = Description(2, 0, 0, "bf16", {}, {})
    with pytest.raises(UserError, match=r"^folder: holds weights only.*checkpoint.start_from"):
        store.check_resumable("folder", found, {})
