"""Launcher x signal x moment x receiver: what is saved, what is left running, the exit code, and what is said.

Real launchers start a stand-in for the ranks, forked ranks train, and tools/launch.py runs in this process. The same
table for users is in docs/launching.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import ROOT, TIMEOUT_S, TRAIN, Process, alone, environment, finish, forked, kill_all, start
from launching import deepspeed as deepspeed_command
from launching import mpirun as mpirun_command
from launching import torchrun as torchrun_command
from tiny_run import Run

from llama_ds.job.folder import VARIABLE
from llama_ds.job.requests import WARNINGS
from llama_ds.launch.supervise.deepspeed_ranks import DeepSpeedRanks
from tests import warm
from tools import launch

INT, TERM, KILL, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP
RANK = str(Path(__file__).with_name("signalled_rank.py"))
GONE = (psutil.NoSuchProcess, ProcessLookupError)
ENDLESS = {"parallel.pp": 2, "training.steps": 10**6}


def wait_for(happened: Callable[[], Any], process: Process | None = None, log: Path = Path(os.devnull)) -> Any:
    """Return the first true value; `log` says why it never came."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := happened()):
        assert time.monotonic() < deadline, f"not in {TIMEOUT_S:g} s: {text_of(log)}"
        assert process is None or process.poll() is None, f"ended with {process.poll()}: {text_of(log)}"
        time.sleep(0.02)
    return found


def text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


# A signal to a process group is what a terminal sends, one to all processes what a scheduler may send.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "receiver", "reasons"),
    [
        ("deepspeed", INT, "group", {"SIGINT"}),
        ("deepspeed", KILL, "launcher", {"the launcher, deepspeed"}),
        ("torchrun", INT, "group", {"SIGINT"}),
        ("torchrun", TERM, "all", {"SIGTERM"}),
        ("torchrun", signal.SIGQUIT, "group", {"SIGQUIT"}),
        ("torchrun", KILL, "launcher", {"the launcher, torchrun"}),
        ("mpirun", INT, "group", {"SIGTERM", "the launcher, prterun"}),
        ("mpirun", TERM, "all", {"SIGTERM"}),
        ("mpirun", HUP, "launcher", {"SIGTERM", "the launcher, prterun"}),
        ("mpirun", KILL, "launcher", {"the launcher, prterun"}),
    ],
)
def test_ranks_of_a_launcher_save_and_end(
    launcher: str, number: signal.Signals, receiver: str, reasons: set[str], tmp_path: Path
) -> None:
    """Nothing is left running, although the launcher may end before its ranks. mpirun sends SIGTERM for any signal."""
    command = {"deepspeed": deepspeed_command, "torchrun": torchrun_command, "mpirun": mpirun_command}[launcher]
    log = tmp_path / "log"
    process = start(command(2, RANK, tmp_path), log)
    try:
        wait_for(lambda: all((tmp_path / f"trains_{rank}").exists() for rank in range(2)), process, log)
        every = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        send(number, receiver, every)
        code = process.wait(TIMEOUT_S)
        left = psutil.wait_procs(every, timeout=TIMEOUT_S)[1]
    finally:
        kill_all(process)
        for rank in tmp_path.glob("trains_*"):
            kill_session(int(rank.read_text()))
    assert left == []
    said = [text_of(tmp_path / f"saved_{rank}").partition(" with process id")[0] for rank in range(2)]
    assert all(reason in reasons for reason in said), (said, log.read_text())
    assert code != 0
    assert log.read_text().count("SIGINT: ending") <= 1
    assert "ended at once" not in log.read_text()


def send(number: signal.Signals, receiver: str, every: list[psutil.Process]) -> None:
    if receiver == "group":
        os.killpg(every[0].pid, number)
    for process in every[:1] if receiver == "launcher" else every if receiver == "all" else []:
        with suppress(*GONE):
            process.send_signal(number)


def kill_session(pid: int) -> None:
    with suppress(*GONE):
        os.killpg(pid, KILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "number", "code"), [(1, INT, 130), (1, HUP, 0), (2, INT, 130)]
)  # SIGTERM: test_run_checkpoints
def test_the_first_signal_saves(ranks: int, number: signal.Signals, code: int, make_run: Callable[..., Run]) -> None:
    """To the last rank alone: all agree. No traceback, and one line that says why the run ends."""
    run = make_run(f"signal_{ranks}_{number.name}", ENDLESS | {"parallel.pp": ranks})
    process = start(forked(ranks, TRAIN, run.file) if ranks > 1 else alone(TRAIN, run.file), run.log)
    try:
        wait_for(lambda: '"step": 2,' in text_of(run.dir / "metrics.jsonl"), process)
        last = [process.pid, *(p.pid for p in psutil.Process(process.pid).children())][-1]
        os.kill(last, number)
        done = finish(process, run.log)
    finally:
        kill_all(process)
    step = int(run.newest.name.removeprefix("step_"))
    assert done.code == code, done.output
    assert done.output.count(f"ending at step {step} of {10**6}") == 1
    assert "Traceback" not in done.output
    assert [path.name for path in run.checkpoints.glob("*_*")] == [run.newest.name]


def test_during_imports_it_ends_with_one_line(tmp_path: Path) -> None:
    """The import of torch takes seconds; here it lasts until it is interrupted."""
    (tmp_path / "torch.py").write_text("import time\nprint('imports', flush=True)\ntime.sleep(600)\n")
    with subprocess.Popen(
        [sys.executable, TRAIN, "ds_configs/quickstart.yaml"], cwd=ROOT, text=True, stdout=-1, stderr=-1,
        env=environment() | {"PYTHONPATH": f"{tmp_path}"},
    ) as process:  # fmt: skip
        assert process.stdout and process.stdout.readline() == "imports\n"
        process.send_signal(INT)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (130, "ended before the first step (SIGINT); there was nothing to save\n")


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[warm.Process]]:
    """Let tools/launch.py start forked ranks; yield what has started them, in the place of DeepSpeed's launcher."""
    started: list[warm.Process] = []

    def begin(ranks: Any) -> dict[str, Any]:
        job = ranks._job
        with open(job.launcher_log, "wb") as log:
            words = [TRAIN, f"@{job.path('arguments')}"]
            variables = environment() | {VARIABLE: job.folder}
            ranks._process = warm.start(words, log, ranks=job.world, environment=variables)
        started.append(ranks._process)
        return {"pid": ranks._process.pid}

    monkeypatch.setattr(DeepSpeedRanks, "begin", begin)
    before = {number: signal.getsignal(number) for number in (INT, TERM, *WARNINGS, signal.SIGUSR1)}
    yield started
    for number, handler in before.items():
        signal.signal(number, handler)
    for process in started:
        kill_session(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment", "code"),
    [
        (HUP, "before the start", 0),
        (TERM, "all 2 ranks have connected", 0),
        (INT, "| loss", 130),
        (KILL, "| loss", 1),  # to DeepSpeed's launcher, not to tools/launch.py
    ],
)
def test_a_supervised_job_ends_as_asked(
    number: signal.Signals, moment: str, code: int, supervised: list[warm.Process], make_run: Callable[..., Run],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whenever the signal comes: it is an end that was asked for, not a death."""
    name = f"job_{number.name}_{moment.split()[0].strip('|')}x"
    run = make_run(name, ENDLESS)
    hostfile = run.file.with_suffix(".hosts")
    hostfile.write_text("localhost slots=2\n")
    lines: list[str] = []

    def print_line(text: str) -> None:
        lines.append(text)
        if moment in text and len([line for line in lines if moment in line]) == 1:
            os.kill(supervised[0].pid if number == KILL else os.getpid(), number)

    monkeypatch.setattr(launch, "print_line", print_line)
    if moment == "before the start":
        handle = launch.handle_signals

        def signalled(supervisor: Any) -> list[int]:
            received = handle(supervisor)
            os.kill(os.getpid(), number)
            return received

        monkeypatch.setattr(launch, "handle_signals", signalled)
    got = launch.main([str(run.file), "--hostfile", str(hostfile), "--beat-s", "0.5"])
    output = "\n".join(lines)
    assert got == code, output
    assert "DIED" not in output and "Traceback" not in output, output
    processes = [p for p in psutil.process_iter() if _is_in(p, str(run.dir))]
    assert psutil.wait_procs(processes, timeout=TIMEOUT_S)[1] == []
    if moment == "before the start":
        assert not supervised and "there was nothing to save" in output
    elif not (run.checkpoints / "latest").exists():
        assert moment != "| loss" and "ended before the first step (asked by the launcher)" in output
    else:
        assert output.count("ending at step") == 1
        assert ("which have saved and ended" in output) == (number == KILL)


def _is_in(process: psutil.Process, folder: str) -> bool:
    try:
        return folder in process.environ().get(VARIABLE, "") and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
