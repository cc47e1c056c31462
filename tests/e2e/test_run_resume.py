"""A run that was stopped or killed resumes bit for bit: same losses, weights and optimizer state."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import TIMEOUT_S, TRAIN, alone, finish, forked, kill_all, start, succeed
from tiny_run import LAYOUTS, STEPS, Run

LONG = 16  # steps of the run that is killed: enough to be killed in the midst of them


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pp2_tp2", "dp2_zero2", "dp2_zero3"])
def test_three_steps_and_three_are_six(name: str, trained: Callable[[str], Run], make_run: Callable[..., Run]) -> None:
    whole, (ranks, changes) = trained(name), LAYOUTS[name]
    halves = make_run(f"{name}_halves", changes)
    succeed(forked(ranks, TRAIN, halves.file, "checkpoint.stop_at=3"), halves.log)
    assert len(halves.losses) == 3
    assert halves.newest.name == "step_00000003"
    output = succeed(forked(ranks, TRAIN, halves.file, "checkpoint.resume=must"), halves.log)
    assert f"resumed at step 3 of {STEPS}" in output
    assert halves.losses == whole.losses
    assert halves.validation == whole.validation
    assert_same_bits(halves.newest, whole.newest)


@pytest.mark.slow
def test_killed_run_goes_on_where_latest_points(make_run: Callable[..., Run]) -> None:
    changes = {**LAYOUTS["pp2_tp2"][1], "training.steps": LONG}
    whole, killed = make_run("whole", changes), make_run("killed", {**changes, "checkpoint.interval": 1})
    succeed(forked(4, TRAIN, whole.file), whole.log)
    complete = {file.name for file in whole.newest.iterdir()}

    process = start(forked(4, TRAIN, killed.file), killed.log)
    seen = watch_latest(killed, process.poll, 3)
    kill_all(process)
    assert all(files >= complete for files in seen.values()), "latest named a checkpoint that was not complete"
    assert killed.newest.name < f"step_{LONG:08d}"

    process = start(forked(4, TRAIN, killed.file, "checkpoint.interval=0"), killed.log)
    done = finish(process, killed.log)
    assert done.code == 0, done.output
    assert "resumed at step" in done.output
    assert killed.losses == whole.losses  # `losses` also checks that each step occurs once
    assert_same_bits(killed.newest, whole.newest)


def test_starting_over_leaves_no_old_lines(trained: Callable[[str], Run], make_run: Callable[..., Run]) -> None:
    """Lines of a run whose checkpoints were taken away, and a line cut short by a kill, do not come back."""
    old, anew = trained("alone"), make_run("anew", {})
    shutil.copytree(old.dir, anew.dir, ignore=shutil.ignore_patterns("checkpoints"))
    with open(anew.dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "tok')
    succeed(alone(TRAIN, anew.file), anew.log)
    assert anew.losses == old.losses


def test_a_lost_tokenizer_costs_no_steps_and_changes_are_logged(
    trained: Callable[[str], Run], make_run: Callable[..., Run]
) -> None:
    """The tokenizer is at the data and the weights are those of the masters, so the newest checkpoint resumes."""
    old, this = trained("alone"), make_run("lost", {"training.steps": STEPS + 1})
    shutil.copytree(old.dir, this.dir)
    (this.newest / "tokenizer.model").unlink()
    (this.newest / "mp_rank_00_model_states.pt").write_bytes(b"cut")
    output = succeed(alone(TRAIN, this.file, "optimizer.eps=1e-6"), this.log)
    assert f"resumed at step {STEPS} of {STEPS + 1}" in output and output.count("DAMAGED FILE, which a resume") == 2
    changed = [line.split(": ", 1)[1] for line in output.splitlines() if "changed since step_00000006: " in line]
    assert changed == [
        "name alone -> lost",
        f"output_dir {old.dir.parent} -> {this.dir.parent}",
        f"training.steps {STEPS} -> {STEPS + 1}",
        "training.tokens 2304 -> 2688",
        "optimizer.eps 1e-08 -> 1e-06",
    ]


def watch_latest(run: Run, ended: Callable[[], int | None], count: int) -> dict[str, set[str]]:
    """Return, for each of the first tags that `latest` is seen to name, the files that it had at that moment."""
    seen: dict[str, set[str]] = {}
    deadline = time.monotonic() + TIMEOUT_S
    while len(seen) < count:
        assert ended() is None and time.monotonic() < deadline, run.log.read_text()
        tag = read(run.checkpoints / "latest")
        if tag and tag not in seen:
            seen[tag] = {file.name for file in (run.checkpoints / tag).iterdir()}
        time.sleep(0.001)
    return seen


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def assert_same_bits(one: Path, other: Path) -> None:
    """Compare every tensor in every file of two checkpoints: weights, master weights, moments."""
    names = sorted(file.name for file in one.glob("*.pt"))
    assert names == sorted(file.name for file in other.glob("*.pt"))
    count = 0
    for name in names:
        first, second = (
            dict(tensors(torch.load(folder / name, map_location="cpu", weights_only=False))) for folder in (one, other)
        )
        assert first.keys() == second.keys()
        for path, tensor in first.items():
            assert torch.equal(tensor, second[path]), f"{name}: {path}"
            count += 1
    assert count > 30, "not the tensors of four layers"


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor inside nested dicts and lists, with its path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors(item, f"{path}.{index}")
