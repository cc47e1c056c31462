"""The folder of checkpoints: which one a run goes on from, what is set aside or removed, and what is left alone."""

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
    """Make folders that look like checkpoints as far as names tell; return where they are."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / DESCRIPTION).touch()
    return str(folder)


def test_without_checkpoints_there_is_none_to_go_on_from(tmp_path: Path) -> None:
    """A run could not start."""
    assert store.newest(str(tmp_path / "absent")) is None
    assert store.newest(str(tmp_path)) is None and store.candidates(str(tmp_path)) == []
    assert store.candidates(str(tmp_path / "absent")) == []


def test_steps_are_numbers(tmp_path: Path) -> None:
    """A run of more than 99999999 steps would go on from an earlier one."""
    steps = [99_999_999, 7, 100_000_000, 1_000_000_000]
    folder = make(tmp_path, *map(store.tag_of, steps))
    assert store.tags(folder) == ["step_1000000000", "step_100000000", "step_99999999", "step_00000007"]
    assert store.newest(folder) == "step_1000000000"
    attempt = begin(folder)
    attempt.point_to(store.tag_of(1_000_000_000))
    attempt.remove_old(Retention(last=2, every=7))
    assert store.tags(folder) == ["step_1000000000", "step_100000000", "step_00000007"]


def test_only_whole_checkpoints_are_candidates(tmp_path: Path) -> None:
    """A run would go on from half a checkpoint, or from somebody's copy of another run's."""
    others = ["step_00000005.partial", "step_00000006.damaged", "step_00000007.replaced", "step_00000008.removed-2"]
    others += ["step_9", "step_00000010-mine", "my_step_00000011", "step_00000012.bak", "step_0000001x"]
    folder = make(tmp_path, store.tag_of(4), *others)
    (tmp_path / store.tag_of(13)).mkdir()  # without a description
    (tmp_path / store.tag_of(14)).touch()
    assert store.candidates(folder) == [store.tag_of(4)]


def test_latest_comes_first_and_then_the_newest(tmp_path: Path) -> None:
    """A user who sets a run back would find it where it was; and one whose checkpoint is damaged at the very start."""
    folder = make(tmp_path, *map(store.tag_of, (1, 2, 3, 4)))
    for named in (2, 1, 4):
        begin(folder).point_to(store.tag_of(named))
        rest = [step for step in (4, 3, 2, 1) if step != named]
        assert store.candidates(folder) == [store.tag_of(step) for step in (named, *rest)]
        assert store.newest(folder) == store.tag_of(named)
    assert (tmp_path / "latest").read_text() == store.tag_of(4)


@pytest.mark.parametrize("content", [b"", b"\n", b"..", b"../step_00000001", b"\xff\xfe\0", b"no such tag"])
def test_a_latest_that_names_no_tag_is_none(tmp_path: Path, content: bytes) -> None:
    """An empty or foreign `latest` would keep a run from its checkpoints, or have a folder elsewhere set aside."""
    folder = make(tmp_path, *map(store.tag_of, (1, 2)))
    (tmp_path / "latest").write_bytes(content)
    assert store.candidates(folder) == [store.tag_of(2), store.tag_of(1)]
    (tmp_path / "latest").write_text(store.tag_of(1) + "\n")  # as an editor writes it
    assert store.newest(folder) == store.tag_of(1)


def test_what_latest_names_is_missed_where_it_is_gone(tmp_path: Path) -> None:
    """A run whose newest checkpoint was deleted would silently go on from an older one, or start anew."""
    attempt = begin(str(tmp_path))
    attempt.point_to(store.tag_of(3))
    assert store.newest(str(tmp_path)) is None and store.candidates(str(tmp_path)) == [store.tag_of(3)]
    folder = make(tmp_path, *map(store.tag_of, (1, 2)))
    assert store.newest(folder) == store.tag_of(2)
    assert store.candidates(folder) == [store.tag_of(step) for step in (3, 2, 1)]
    assert attempt.set_aside_damaged(store.tag_of(3)) == "gone"
    assert store.tags(folder) == [store.tag_of(2), store.tag_of(1)]


def test_cleaning_takes_what_is_unfinished_and_nothing_else(tmp_path: Path) -> None:
    """A disk would fill with what killed saves leave; or a folder that is somebody's own would be gone."""
    going = ["step_00000005.partial", "step_00000006.replaced", "step_00000006.replaced-2", "step_00000007.removed"]
    going += ["attempt_0123456789abcdef"]
    staying = [store.tag_of(4), "step_00000006.damaged", "step_00000006.damaged-2", "step_00000008.mine"]
    staying += ["step_00000005.partial.bak", "old.partial", "step_7.partial", "step_00000009", "attempt_01"]
    folder = make(tmp_path, *going, *staying)
    (tmp_path / "latest").write_text(store.tag_of(4))
    (tmp_path / "latest.tmp").touch()  # of an earlier version, too
    attempt = SaveAttempt(folder, new_id())
    assert attempt.begin() == sorted([*going, "latest.tmp"])
    assert names(attempt) == {*staying, store.LATEST}
    attempt.end()
    assert set(os.listdir(folder)) == {*staying, store.LATEST}
    attempt.end()


def test_what_is_damaged_is_set_aside_and_kept(tmp_path: Path) -> None:
    """Somebody may still want to look into it; and a second one of the same step must not hide the first."""
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


def test_removal_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    """What a killed removal leaves would stand in the way of the next, or stay for ever."""
    attempt = begin(make(tmp_path, *map(store.tag_of, (1, 2, 3))))
    make(Path(attempt.path), "step_00000001.removed", "step_00000002.removed")
    attempt.point_to(store.tag_of(3))
    attempt.remove_old(Retention(last=1))
    assert names(attempt) == {store.LATEST, store.tag_of(3)}


def test_publishing_moves_what_is_there_aside(tmp_path: Path) -> None:
    """Two checkpoints would be mixed in one folder."""
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
    return {**found.run, "training": {"global_batch": 4}, "data": {"seq_len": 32}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed 1, not 2"),
        ({"training": {"global_batch": 8}}, "training.global_batch 4, not 8"),
        ({"data": {"seq_len": 64}}, "data.seq_len 32, not 64"),
        ({"model": {**asdict(SMALL), "vocab_size": 8, "head_dim": 4}}, "model vocab_size 6, not 8, head_dim 2, not 4"),
    ],
)
def test_another_run_is_refused(change: dict[str, object], message: str) -> None:
    """A run would go on with other weights, or read rows twice and others never."""
    found = description(SMALL, ONE, 1, 2)
    run = run_of(found)
    found.run.update(run)
    store.check_resumable("place", found, run)
    store.check_resumable("place", found, {**run, "optimizer": {"lr": 1.0}})
    with pytest.raises(UserError, match=f"^place: was trained with {message}; use the same run file"):
        store.check_resumable("place", found, {**run, **change})


def test_weights_alone_are_not_a_run_to_go_on_with() -> None:
    """Training would go on with an optimizer of zeros, as if nothing were missing."""
    found = Description(2, 0, 0, "bf16", {}, {})
    with pytest.raises(UserError, match=r"^place: holds weights only.*checkpoint.start_from"):
        store.check_resumable("place", found, {})
