"""llama_ds installed from its wheel: the command llama-ds, in a folder that has nothing of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKED = ("llama_ds", "tools", "ds_configs", "hostfiles", "docs/calibration")
COMMANDS = sorted(path.stem.replace("_", "-") for path in (REPO / "tools").glob("*.py"))
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"

# Every command's help in one process: each of its own would import torch again.
HELPS = """
import contextlib, io, json, sys
from llama_ds.__main__ import main
found = {}
for name in json.loads(sys.argv[1]):
    sys.argv = ["llama-ds", name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = main()
        except SystemExit as end:
            code = end.code
    found[name] = [code, out.getvalue()]
import llama_ds
print(json.dumps({"where": llama_ds.__file__, "helps": found}))
"""


class Installed:
    """A virtual environment with the wheel, and a folder to work in."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root / "venv", root / "work"
        self.folder.mkdir()
        self.python = self.root / "bin" / "python"

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        """Run a command as a user who has activated the environment."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        path = f"{self.root / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            [str(word) for word in command], cwd=self.folder, capture_output=True, text=True, timeout=300,
            env=kept | {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip

    def succeed(self, *command: object) -> str:
        """Run a command that must succeed; return its stdout."""
        done = self.run(*command)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build the wheel from a copy, so that the checkout gets no build folder, and install it without a network."""
    root = tmp_path_factory.mktemp("installed")
    copy = root / "copy"
    for name in PACKED:
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(REPO / name, copy)
    subprocess.run([sys.executable, "-c", BUILD, str(root)], cwd=copy, check=True, capture_output=True)
    (wheel,) = root.glob("*.whl")
    shutil.rmtree(copy)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], check=True)
    environment = Installed(root)
    # The libraries are those of this environment; an editable llama_ds in it is not, as .pth files there are not read.
    (site,) = (root / "venv" / "lib").glob("python*/site-packages")
    (site / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(environment.python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-compile", str(wheel)], check=True)
    return environment


def test_every_command_says_how_it_is_used(installed: Installed) -> None:
    overview = installed.succeed("llama-ds", "--help")
    for name in ("train", *COMMANDS):
        assert f"\n  {name} " in overview
    answer = json.loads(installed.succeed("python", "-c", HELPS, json.dumps(["train", *COMMANDS])))
    assert Path(answer["where"]).is_relative_to(installed.root)
    for name, (code, text) in answer["helps"].items():
        assert code == 0 and text.startswith(f"usage: llama-ds {name} ")
        assert "tools/" not in text, name  # an example that could not be typed


def test_shipped_files_are_found_by_name_from_anywhere(installed: Installed) -> None:
    said = installed.succeed("llama-ds", "launch", "llama_65b.yaml", "--hostfile", "256x8", "--dry-run")
    assert "256 hosts of 8 slots, 2048 ranks" in said and "site-packages/llama_ds/train.py" in said
    assert "llama_7b" in installed.succeed("llama-ds", "plan", "estimate", "ds_configs/llama_7b.yaml", "--gpus", 8)
    own = installed.folder / "llama_7b.yaml"  # a file of the user's own comes first
    own.write_text("model: {}\n")
    mistake = installed.run("llama-ds", "plan", "estimate", "llama_7b.yaml", "--gpus", 8)
    own.unlink()
    assert mistake.returncode == 2 and mistake.stderr.startswith("error: llama_7b.yaml")


def test_an_unknown_command_is_named(installed: Installed) -> None:
    done = installed.run("llama-ds", "lunch")
    assert done.returncode == 2
    assert done.stderr.startswith("error: llama-ds: no command 'lunch' (did you mean 'launch'?); use one of train, ")


@pytest.mark.slow
def test_ranks_of_a_launched_job_train_and_resume(installed: Installed, words: dict[str, object]) -> None:
    """`llama-ds launch` starts the installed train.py; `llama-ds train`, without a launcher, goes on with its run."""
    from tiny_run import Corpus, write_run

    corpus = Corpus(Path(str(words["tokenizer"])), Path(str(words["shards"])))
    write_run(
        installed.folder, "tiny", corpus, {"training.steps": 2, "optimizer.warmup_steps": 1, "evaluation.rows": 4}
    )
    (installed.folder / "hosts").write_text("localhost slots=1\n")
    said = installed.succeed("llama-ds", "launch", "tiny.yaml", "--hostfile", "hosts")
    assert "step 2/2" in said
    said = installed.run("llama-ds", "train", "tiny.yaml", "training.steps=3")
    assert said.returncode == 0 and "resumed at step 2 of 3" in said.stdout + said.stderr
