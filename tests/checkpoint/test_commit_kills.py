"""kill -9 of one rank or all ranks, at every point of a save and at random times, loses or damages no checkpoint."""

from __future__ import annotations

import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from commit_contents import LARGE, SMALL, THREE, check_checkpoint, check_folder, linked, names, ranks, save
from commit_points import without_writes
from commit_worker import Outcome, Trial
from worker_process import worker_process

from llama_ds.checkpoint import store

RANKS = (0, 1, 2)
KILLED = -9
# Points that must be among those observed: the operations of the documented protocol.
FIRST, OWN = "attempt_0000000000000001", "attempt_0000000000000002"  # the attempts of lives 1 and 2
PARTIAL, DURABLY = f"{OWN}/step_00000004", ("open", "fsync", "rename")
SMALL_FILES = ("rank_00000", "rank_00001", "rank_00002", "index", "llama_ds")
PROTOCOL = {
    *(f"{how} {PARTIAL}/mp_rank_0{part}_model_states.pt" for how in ("open", "write", "fsync") for part in (0, 1)),
    *(f"{how} {PARTIAL}/{name}.json.tmp" for how in DURABLY for name in SMALL_FILES),
    *(f"{how} {OWN}/latest" for how in DURABLY),
    *("rename step_00000004", f"rename {PARTIAL}", "fsync .", "fsync . #2"),
    *("rename step_00000002", f"rmdir {OWN}/step_00000002.removed", f"rmdir {OWN}/step_00000004.replaced"),
}
PUBLISHING = (f"rename {PARTIAL}", f"open {OWN}/latest", f"rename {OWN}/latest")
RANDOM_KILLS = 20
Perform = Callable[[Trial], Outcome]
Save = tuple[int, int]  # life, step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def perform() -> Iterator[Perform]:
    """Return a function that runs a trial in separate processes, which die only of the trial's kills."""
    with worker_process("commit_worker.py") as ask:

        def perform(trial: Trial) -> Outcome:
            outcome = Outcome(**ask(asdict(trial)))
            assert not outcome.hung, trial
            return outcome

        yield perform


@pytest.fixture(scope="module")
def workspace() -> Iterator[Path]:
    """Return a folder, in memory if possible: kills have the same effect there as on a disk, and syncs are free."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def tokenizer(workspace: Path) -> str:
    path = workspace / "any.model"
    path.write_bytes(b"pieces" * 100)
    return str(path)


@pytest.fixture(scope="module")
def three(perform: Perform, tokenizer: str, workspace: Path) -> Path:
    """Return a folder in which life 1 has saved steps 1, 2 and 3."""
    folder = workspace / "three"
    assert perform(Trial(str(folder), 1, [1, 2, 3], tokenizer)).committed == [1, 2, 3]
    assert check_folder(str(folder)) == [(1, 3), (1, 2), (1, 1)]
    return folder


@pytest.fixture(scope="module")
def rewound(perform: Perform, three: Path, tokenizer: str, workspace: Path) -> Path:
    """Return a folder of a run that has saved step 4 and is to resume from step 3."""
    folder = shutil.copytree(three, workspace / "rewound")
    assert perform(Trial(str(folder), 1, [4], tokenizer)).committed == [4]
    (folder / store.LATEST).write_text(store.tag_of(3))  # a user may edit it like this
    assert check_folder(str(folder)) == [(1, 3), (1, 4), (1, 2), (1, 1)]
    return folder


def points_of(outcome: Outcome, rank: int) -> list[str]:
    """Return the points at which to kill a rank; of the writes to a file only the first, a torn one and the last."""
    seen = [point for _, of, point in sorted(outcome.points) if of == rank and not point.startswith("synced")]
    chosen, writes = without_writes(seen)
    for points in writes:
        torn = "torn" + points[len(points) // 2].removeprefix("write")
        chosen += dict.fromkeys((points[0], torn, points[-1]))
    return chosen


def kill_and_restart(perform: Perform, trial: Trial, before: Save | None) -> set[str]:
    """Perform a trial in which all ranks die; check the folder, restart the run as training does, and let it save.

    `before` is the save to resume from before the trial. Return the kinds of leftovers in the attempt's folder.
    """
    folder, tags = trial.folder, store.tags(trial.folder)
    outcome = perform(trial)
    assert outcome.ends == [KILLED] * len(RANKS)
    found = check_folder(folder)
    committed = max(outcome.committed, default=0)
    good = {(trial.life, step) for step in trial.steps if step >= committed} | (set() if committed else {before})
    first = found[0] if found else None
    assert first in good, f"{first} would be loaded, though rank 0 last committed {committed or before}"
    if not trial.keep[0]:
        assert {*tags, *map(store.tag_of, outcome.committed)} <= set(store.tags(folder))

    candidates, left = store.candidates(folder), os.listdir(trial.attempt.path)
    life, step = trial.life + 1, first[1] + 1 if first else 1
    model = LARGE if trial.large else SMALL
    run = ranks(folder, THREE, trial.tokenizer, store.Retention(last=2), model)
    assert {name for name in names(run[0].attempt) if not re.fullmatch(r"step_\d+", name)} <= {store.LATEST}
    assert store.candidates(folder) == candidates
    save(run, life, step)
    assert store.candidates(folder)[0] == store.tag_of(step)
    assert check_checkpoint(folder, store.tag_of(step)) == (life, step)
    assert len(store.tags(folder)) <= 2 and names(run[0].attempt) == {store.LATEST, *store.tags(folder)}
    return {name.partition(".")[2] or "partial" for name in left}


def test_a_kill_at_any_point_of_a_save_loses_nothing(
    perform: Perform, three: Path, rewound: Path, tokenizer: str, workspace: Path
) -> None:
    """Otherwise a node failure during a save could lose the run, or make it resume with wrong weights.

    One rank dies before or during each of its operations in the folder. The others die at once, or when they cannot
    proceed without it. In the first folder, step 4 is a new checkpoint; in the second, it replaces one, and two others
    are deleted.
    """
    kills: Counter[str] = Counter()
    known: set[str] = set()
    for base, keep in ((three, (0, 0)), (rewound, (2, 0))):
        folder = linked(base, workspace / "counted")
        outcome = perform(Trial(str(folder), 2, [4], tokenizer, keep, watch=True))
        assert outcome.committed == [4] and check_folder(str(folder))[0] == (2, 4)
        shutil.rmtree(folder)
        points = [(rank, point) for rank in RANKS for point in points_of(outcome, rank)]
        for number, (rank, point) in enumerate([x for x in points if x[1] not in known or x[1] in PUBLISHING]):
            folder = linked(base, workspace / "killed")
            leave = number % 2 == 0
            trial = Trial(str(folder), 2, [4], tokenizer, keep, victim=rank, point=point, leave=leave)
            try:
                kill_and_restart(perform, trial, (1, 3))
            except AssertionError as error:
                raise AssertionError(f"rank {rank} killed at: {point}; the others left alone: {leave}") from error
            kills[point] += 1
            shutil.rmtree(folder)
        known |= {point for _, point in points}
    assert set(kills) == known >= PROTOCOL
    assert sum(kills.values()) >= 100
    print(f"\n{sum(kills.values())} kills at {len(kills)} points")


@pytest.mark.parametrize(
    "point",
    [f"rename {FIRST}/step_00000001/rank_00000.json.tmp", f"rename {FIRST}/step_00000001", f"rename {FIRST}/latest"],
)
def test_a_kill_in_the_first_save_leaves_a_run_that_starts(
    perform: Perform, tokenizer: str, workspace: Path, point: str
) -> None:
    """Otherwise an incomplete first checkpoint would keep the run from starting."""
    folder = str(workspace / point.replace("/", " "))
    kill_and_restart(perform, Trial(folder, 1, [1], tokenizer, victim=0, point=point), None)


def test_kills_at_random_times_lose_nothing(perform: Perform, tokenizer: str, workspace: Path) -> None:
    """The test above kills only at observable points; a kill may come at any other moment, also with 4 MB checkpoints.

    All ranks are killed up to 0.4 s after the first commit, while they save as fast as possible.
    """
    generator = random.Random(7)
    left: Counter[str] = Counter()
    for number in range(RANDOM_KILLS):
        folder, after_s = workspace / str(number), generator.uniform(0, 0.4)
        steps = list(range(1, 5_000))  # more than are saved until then, however late this process gets a turn
        trial = Trial(str(folder), 1, steps, tokenizer, (2, 3), large=True, kill_after_s=after_s)
        left.update(kill_and_restart(perform, trial, None) or {"nothing"})
        shutil.rmtree(folder)
    assert left["partial"] > 0
    print(f"\n{RANDOM_KILLS} kills at random times left {dict(left)}")


def test_a_checkpoint_is_durable_before_it_counts(
    perform: Perform, three: Path, tokenizer: str, workspace: Path
) -> None:
    """Otherwise a power failure could leave a checkpoint whose files have names but no content; kill -9 cannot.

    Each rank must sync its changes before it announces them by its record, the description, the tag or `latest`.
    """
    saved = linked(three, workspace / "c")
    outcome = perform(Trial(str(saved), 2, [4], tokenizer, watch=True))
    unsynced: set[tuple[int, str]] = set()  # (rank, file or folder whose changes are not yet durable)
    announced = []
    for _, rank, point in sorted(outcome.points):
        operation, path, *again = point.split()
        name, parent = os.path.basename(path), os.path.dirname(path) or "."
        own = {p for r, p in unsynced if r == rank}
        if operation == "write" or (operation == "open" and name.endswith((".tmp", "latest"))):
            unsynced.add((rank, path))
        elif operation == "open" and name.endswith((".pt", ".model")) and not again:
            unsynced |= {(rank, path), (rank, parent)}
        elif operation == "synced":
            unsynced.discard((rank, path))
        elif operation == "rename":
            assert own == set() or (name == "index.json.tmp" and own <= {parent}), f"{point}: before {own} are synced"
            changed = {"step_00000004": [parent, "."], "latest": ["."]}.get(name, [parent])
            if not name.startswith("rank_"):  # records are deleted before the commit and need not be durable
                unsynced |= {(rank, folder) for folder in changed}
            announced.append(name)
    assert unsynced == set()
    records = [f"rank_{rank:05d}.json.tmp" for rank in RANKS]
    assert sorted(announced[:3]) == records
    assert announced[3:] == ["index.json.tmp", "llama_ds.json.tmp", "step_00000004", "latest"]
