"""Starts real processes for the tests, with every supported launcher, and returns their results."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from llama_ds.machine import free_port
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "llama_ds" / "train.py")
BIN = Path(sys.executable).parent
TIMEOUT_S = 600  # timeout of one command: a hang is a failure, a slow machine is not


@dataclass(frozen=True)
class Finished:
    """Result of a command: its exit code, and stdout and stderr combined."""

    code: int
    output: str

    @property
    def errors(self) -> list[str]:
        """The error lines for the user."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


@dataclass(frozen=True)
class Warm:
    """A command that tests/warm.py starts: `python WORDS`, or that many ranks of it."""

    words: list[str]
    ranks: int = 0

    def with_more(self, *arguments: object) -> Warm:
        """Return this command with more arguments."""
        return Warm([*self.words, *words(arguments)], self.ranks)


Command = Sequence[str] | Warm
Process = subprocess.Popen[bytes] | warm.Process


def deepspeed(ranks: int, *arguments: object) -> list[str]:
    """Return the command of DeepSpeed's launcher on this machine."""
    return [
        str(BIN / "deepspeed"),
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        *words(arguments),
    ]


def warm_deepspeed(ranks: int, *arguments: object) -> Warm:
    """Return it for tests that do not kill it: its first process is forked, what it starts begins as a user's does."""
    return Warm(deepspeed(ranks, *arguments))


def torchrun(ranks: int, *arguments: object) -> list[str]:
    """Return the command of torch's launcher."""
    return [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", str(free_port()), *words(arguments)]


def mpirun(ranks: int, *arguments: object) -> list[str]:
    """Return the command of Open MPI's launcher, from the wheel in this environment.

    A killed mpirun leaves its session folder ompi.PID, and with it a later one of the same process id does not start.
    """
    for folder in Path(tempfile.gettempdir()).glob("ompi.*"):
        if folder.suffix[1:].isdigit() and not psutil.pid_exists(int(folder.suffix[1:])):
            shutil.rmtree(folder, ignore_errors=True)
    options = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    return [str(BIN / "mpirun"), "-n", str(ranks), *options, sys.executable, *words(arguments)]


def forked(ranks: int, *arguments: object) -> Warm:
    """Return the command of a fast launcher, for tests that do not test launchers."""
    return Warm(words(arguments), ranks)


def alone(*arguments: object) -> Warm:
    """Return the command of a single process without a launcher."""
    return Warm(words(arguments))


def python(*arguments: object) -> list[str]:
    """Return the command of a process that starts as a user's does, with nothing imported."""
    return [sys.executable, *words(arguments)]


def start(command: Command, log: Path) -> Process:
    """Start a command in a session of its own, so that all its processes can be killed together."""
    with open(log, "wb") as file:
        if isinstance(command, Warm):
            return warm.start(command.words, file, ranks=command.ranks, environment=environment())
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip


def finish(process: Process, log: Path, timeout_s: float = TIMEOUT_S) -> Finished:
    """Wait for a started command; kill all of its processes afterwards, also if it hangs."""
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"hangs for {timeout_s} s: {process.args}\n{log.read_text()[-4000:]}") from None
    finally:
        kill_all(process)
    return Finished(code, log.read_text(errors="replace"))


def run(command: Command, log: Path, timeout_s: float = TIMEOUT_S) -> Finished:
    """Run a command to its end."""
    return finish(start(command, log), log, timeout_s)


def succeed(command: Command, log: Path, timeout_s: float = TIMEOUT_S) -> str:
    """Run a command that must succeed; return its output."""
    done = run(command, log, timeout_s)
    assert done.code == 0, f"exit code {done.code}: {command}\n{done.output[-6000:]}"
    return done.output


def kill_all(process: Process) -> None:
    """Kill -9 a started command: the launcher and every rank at once."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def environment() -> dict[str, str]:
    """Return the environment of the commands: no GPU, one thread per process, no launcher above them."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "SLURM_", "RANK", "WORLD_SIZE"))}
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**kept, **as_root, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def words(arguments: Sequence[object]) -> list[str]:
    """Return the arguments as words of a command line."""
    return [str(argument) for argument in arguments]
