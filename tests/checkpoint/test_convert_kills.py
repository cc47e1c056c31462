"""kill -9 of a conversion leaves no destination or the whole one, whatever the format, and the source as it was."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from worker_process import worker_process
from written_ranks import SHAPES, Write

from llama_ds.checkpoint.choices import TARGETS
from llama_ds.checkpoint.conversion.partial import JOURNAL
from llama_ds.checkpoint.load_model import kind_of
from llama_ds.errors import UserError

pytestmark = pytest.mark.slow

KILLED, NONE = -9, ""
# Every writer, and hf with all of its files.
KINDS = [*(kind for kind in TARGETS if kind not in ("hf", "megatron_legacy")), "hf --card"]
TREE = dict[str, bytes]


@dataclass(frozen=True)
class Answer:
    code: int
    points: list[str]
    error: str


Perform = Callable[..., Answer]


@pytest.fixture(scope="module")
def perform() -> Iterator[Perform]:
    """Return a function that converts in a process of its own, which dies of the wanted kill only."""
    with worker_process("convert_worker.py") as ask:

        def perform(words: list[str], folder: Path, fatal: str | None) -> Answer:
            """`fatal`: point of the kill; NONE: it lives; None: it runs in the worker itself, and has its points."""
            return Answer(**ask({"words": words, "folder": str(folder), "fatal": fatal}))

        yield perform


@pytest.fixture
def workspace() -> Iterator[Path]:
    """Return a folder, in memory if possible: kills have the same effect there as on a disk, and syncs are free."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def tree(folder: Path) -> TREE:
    if folder.is_file():
        return {folder.name: folder.read_bytes()}
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def states(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(f): (f.stat().st_mtime_ns, f.stat().st_ino) for f in folder.rglob("*")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_conversion_ends_in_a_whole_destination(
    perform: Perform, write: Write, workspace: Path, kind: str
) -> None:
    source = write(1, True, model=SHAPES["gqa"])
    name = "model.gguf" if kind == "gguf" else "model"
    options = ["--to", *kind.split(), "--no-logits", "--workers", "1"]
    plain, out = (workspace / which / name for which in ("plain", "out"))
    before = tree(Path(source)), states(Path(source))
    points = perform([source, str(plain), *options], plain.parent, None).points
    partial = workspace / "out" / f"{name}.partial"
    # In the middle of the weights, before the last file, before the final rename.
    writes = [point for point in points if point.startswith("write") and JOURNAL not in point]
    opened = [point for point in points if point.startswith(f"open {partial.name}/") and JOURNAL not in point]
    last = [point for point in points if point.startswith(f"rename {partial.name}")][-1]
    for fatal in (writes[len(writes) // 2], opened[-1], last):
        assert perform([source, str(out), *options], out.parent, fatal).code == KILLED, fatal
        assert os.listdir(out.parent) == [partial.name], fatal
        if fatal != last:  # afterwards it is whole and verified
            with pytest.raises(UserError, match="working folder of a conversion that was interrupted"):
                kind_of(str(partial))
    refused = perform([source, str(out), *options], out.parent, NONE).error.splitlines()[-1]
    assert refused.startswith(f"error: {partial}: was left by") and refused.endswith("or give --overwrite")
    assert os.listdir(out.parent) == [partial.name]
    assert perform([source, str(out), *options, "--overwrite"], out.parent, NONE).code == 0
    assert tree(out) == tree(plain) and os.listdir(out.parent) == [name]
    assert (tree(Path(source)), states(Path(source))) == before


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_killed_replacement_leaves_the_old_or_the_new(
    perform: Perform, write: Write, workspace: Path, kind: str
) -> None:
    source, out = write(1, True, model=SHAPES["gqa"]), workspace / "out" / "model.gguf"
    words = [source, str(out), "--to", kind, "--no-logits", "--overwrite"]
    assert perform(words, out.parent, None).code == 0
    old = tree(out)
    assert perform(words, out.parent, f"rename {out.name}").code == KILLED and tree(out) == old
    assert perform(words, out.parent, f"remove {out.name}.partial/{JOURNAL}").code == KILLED and not out.exists()
    (aside,) = out.parent.glob("*.replaced-*")
    assert list(tree(aside).values()) == list(old.values())
    assert perform(words, out.parent, "fsync .").code == KILLED and tree(out) == old  # the new one is in place
    assert perform(words, out.parent, NONE).code == 0
    assert tree(out) == old and os.listdir(out.parent) == [out.name]
