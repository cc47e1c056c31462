"""What a run's folder says of the code that trained it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from llama_ds.training import machines

AUTHOR = {f"GIT_{who}_{what}": "tester@here" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, env=os.environ | AUTHOR, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkout with one commit, which stands for that of the package."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "model.py").write_text("width = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    monkeypatch.setattr(machines, "CHECKOUT", folder)
    (tmp_path / "run").mkdir()
    return folder


def test_commit_and_changes_restore_the_code(checkout: Path, tmp_path: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert machines.code_of(str(tmp_path / "run")) == {"commit": commit}
    (checkout / "model.py").write_text("width = 2\n")
    (checkout / "new file.py").touch()
    for number in range(120):
        (checkout / f"x{number:03d}").touch()
    code = machines.code_of(str(tmp_path / "run"))
    assert code["commit"] == commit
    assert code["untracked"] == ["new file.py", *(f"x{number:03d}" for number in range(99)), "and 21 more"]
    git(checkout, "checkout", "-q", "model.py")
    git(checkout, "apply", str(tmp_path / "run" / code["changes"]))
    assert (checkout / "model.py").read_text() == "width = 2\n"


def test_an_installed_package_within_another_checkout_is_not_taken_for_it(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "venv").mkdir()
    monkeypatch.setattr(machines, "CHECKOUT", checkout / "venv")
    assert machines.code_of(str(tmp_path / "run")) == {}


def test_a_broken_repository_ends_no_run(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".git" / "HEAD").write_text("nonsense")
    assert machines.code_of(str(tmp_path / "run")) == {}
