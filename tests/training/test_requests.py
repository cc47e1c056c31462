"""Signals and other requests to a rank: which end it at once, what it says, and which are the launcher's copies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_ds.job.launcher_watch import watched
from llama_ds.job.requests import Request, Requests, Stage

ROOT = Path(__file__).resolve().parents[2]
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
QUIT, USR2, XCPU = signal.SIGQUIT, signal.SIGUSR2, signal.SIGXCPU
CLOSED = "outputs: interrupted"
PROGRAM = """
import os, signal, sys, time
from llama_ds.job import requests
from llama_ds.job.requests import Requests, Stage
this = Requests(dict(pair.split("=") for pair in sys.argv[2].split()))
this.listen()
this.before_end(lambda end: os.write(2, f"outputs: {end.value}\\n".encode()))
this.enter(Stage[sys.argv[1]])
for word in sys.argv[3:]:
    if word == "later":
        requests.COPY_S = 0.0
    else:
        os.kill(os.getpid(), int(word))
os._exit(this.take())
"""


def after(stage: Stage, environment: str, *signals: int | str) -> tuple[int, list[str]]:
    """Return the exit code and lines of a process that gets these signals: the highest request if it lives on."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, stage.name, environment, *map(str, map(_number, signals))],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not done.stdout
    return done.returncode, done.stderr.splitlines()


def _number(word: int | str) -> int | str:
    return word if isinstance(word, str) else int(word)


@pytest.mark.parametrize("number", [INT, TERM, HUP, QUIT, USR2, XCPU])
def test_with_nothing_to_save_the_process_ends_at_once(number: signal.Signals) -> None:
    line = f"ended before the first step ({number.name}); there was nothing to save"
    assert after(Stage.ALONE, "", number) == (128 + number, [line, CLOSED])
    assert after(Stage.ALONE, "RANK=1 WORLD_SIZE=2", number) == (128 + number, [CLOSED])  # the first rank says it


@pytest.mark.parametrize(
    ("environment", "signals", "ends"),
    [
        ("", [INT, INT], INT),
        ("", [INT, TERM], TERM),
        ("", [HUP, HUP, TERM], None),  # a closed terminal sends several
        ("", [USR2, QUIT, XCPU, XCPU, TERM], None),  # warnings of schedulers, and Ctrl-\
        # DeepSpeed and mpirun send SIGTERM for any signal: to their ranks, which may have received the same.
        ("RANK=0", [INT, TERM], None),
        ("RANK=0", [INT, TERM, INT], INT),
        ("RANK=0", [TERM, TERM, TERM], None),
        ("RANK=0", [TERM, "later", TERM], TERM),
        ("OMPI_COMM_WORLD_RANK=0", [TERM, TERM], None),
        # torchrun and Hydra send the same signal.
        ("RANK=0 TORCHELASTIC_RUN_ID=x", [INT, INT], None),
        ("RANK=0 TORCHELASTIC_RUN_ID=x", [INT, "later", INT], INT),
        ("RANK=0 TORCHELASTIC_RUN_ID=x", [INT, TERM], TERM),
        ("PMI_RANK=0", [INT, INT], None),
    ],
)
def test_a_second_signal_ends_at_once_unless_it_is_a_copy(
    environment: str, signals: list[int | str], ends: signal.Signals | None
) -> None:
    code, lines = after(Stage.TOGETHER, environment, *signals)
    if ends is None:
        assert code == (Request.INTERRUPT if INT in signals else Request.END)
        assert len(lines) <= 1
    else:
        assert (code, lines[1:]) == (
            128 + ends, [f"ended at once ({ends.name} again); what was not yet saved is lost", CLOSED]
        )  # fmt: skip


def test_a_finished_run_is_left_alone() -> None:
    """Launchers send SIGTERM to all ranks when the first one exits with a code."""
    assert after(Stage.FINISHED, "", INT, TERM, INT) == (Request.NOTHING, [])


def test_ranks_that_do_not_join_end() -> None:
    """One that waits for a rank that never comes would wait for half an hour."""
    program = PROGRAM.replace("os._exit(this.take())", "time.sleep(600)")
    program = program.replace("this = ", "requests.JOIN_S = 0.01\nthis = ")
    done = subprocess.run(
        [sys.executable, "-c", program, "JOINING", "RANK=0", str(int(TERM))],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 128 + TERM
    assert done.stderr.splitlines()[-2].startswith("ended before the first step (SIGTERM)")


def test_a_checkpoint_gives_no_reason_for_an_end() -> None:
    this = Requests({})
    this.enter(Stage.TOGETHER)
    this.ask(Request.SAVE, "SIGUSR1")
    assert (this.take(), this.take(), this.reason) == (Request.SAVE, Request.NOTHING, "")
    this.ask(Request.END, "the wall-time limit")
    assert (this.take(), this.take(), this.reason) == (Request.END, Request.END, "the wall-time limit")


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID", "PMI_RANK"])
def test_a_rank_of_mpirun_leaves_its_session(variable: str) -> None:
    """mpirun of Open MPI, MPICH and Intel MPI takes what it has started with it; srun, by PMI_RANK, does not."""
    program = (
        f"leave_session_of_mpirun({{{variable!r}: '0'}}); print(os.getsid(0) == os.getpid(), starter()); sys.exit(3)"
    )
    program = f"import os, sys; from llama_ds.job.own_session import leave_session_of_mpirun, starter; {program}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{variable != 'PMI_RANK'} {os.getpid()}\n", "")


PYTHON, SHELL, SSH = "/venv/bin/python3.11", ["-bash"], ["sshd: me@notty"]
LAUNCH = [PYTHON, "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "train.py"]


@pytest.mark.parametrize(
    ("chain", "names"),
    [
        ([LAUNCH, [PYTHON, "/venv/bin/deepspeed", "train.py"], SHELL, SSH],
         ["deepspeed.launcher.launch", "deepspeed", "", ""]),
        ([LAUNCH, ["sh", "-c", "cd /x; python"], SSH, ["sshd: /usr/sbin/sshd"]],
         ["deepspeed.launcher.launch", "", "ssh", ""]),
        ([[PYTHON, "/venv/bin/torchrun", "train.py"], ["sshd: me@pts/1"]], ["torchrun", ""]),
        ([[PYTHON, "-m", "torch.distributed.run", "train.py"]], ["torch.distributed.run"]),
        ([[PYTHON, "-u", "train.py"], ["/venv/bin/mpirun", "-n", "2", "python"]], ["", "mpirun"]),
        ([["mpiexec.hydra", "-n", "2"], ["/bin/sh", "/opt/intel/bin/mpirun", "-n", "2"], ["/bin/sh", "job.sh"], ["sh"]],
         ["mpiexec.hydra", "mpirun", "", ""]),
        ([["prted", "--prtemca"], ["hydra_pmi_proxy"]], ["prted", "hydra_pmi_proxy"]),
        ([["bash", "run.sh", "deepspeed"], SHELL, SSH, []], ["", "", "", ""]),  # no launcher: it may end first
    ],
)  # fmt: skip
def test_which_ancestors_are_watched(chain: list[list[str]], names: list[str]) -> None:
    assert watched(chain) == names
