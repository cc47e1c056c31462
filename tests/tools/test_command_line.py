"""Common behaviour of all tools: help, mistakes, closed pipes, Ctrl-C, clean stdout, no output of libraries."""

from __future__ import annotations

import ast
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from calling import Finished, Tools
from calls import NORMAL, WAITING, WITH_RANKS

from llama_ds.child_processes import ended_like_ctrl_c, run_child, without_interrupts
from tests.console import foreign_lines

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))
CLOSED_PIPE, INTERRUPTED = 141, 130
DRY_RUN = pytest.param("dryrun.py", marks=pytest.mark.slow)  # it starts processes of its own


def filled(call: str, words: dict[str, Any], new: Path) -> list[str]:
    return [word.format(**words, new=new) for word in call.split()]


def test_every_tool_has_its_calls() -> None:
    assert sorted([*NORMAL, *WITH_RANKS]) == sorted(WAITING) == TOOLS


@pytest.mark.slow
def test_imports_say_nothing() -> None:
    program = "import llama_ds.benchmarks.compare, llama_ds.training.loop, llama_ds.training.dry_run.run"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("tool", TOOLS)
def test_help_shows_an_example(tools: Tools, tool: str) -> None:
    done = tools.call(f"tools/{tool}", "--help")
    assert (done.code, done.err) == (0, "")
    assert f"\n  tools/{tool} " in done.out


@pytest.mark.parametrize("tool", TOOLS)
def test_an_unknown_option_is_one_line_below_the_usage(tools: Tools, words: dict[str, Any], tool: str) -> None:
    done = tools.call(f"tools/{tool}", *filled(WAITING[tool], words, Path("new")), "--no-such-option")
    assert (done.code, done.out) == (2, "")
    usage, line = done.err.rstrip("\n").rsplit("\n", 1)
    assert usage.startswith(f"usage: {tool} ") and line == f"{tool}: error: unrecognized arguments: --no-such-option"


@pytest.mark.parametrize("tool", TOOLS)
def test_a_reader_that_leaves_ends_it_quietly(tools: Tools, tool: str) -> None:
    done = tools.call(f"tools/{tool}", "--help", closed=True)
    assert (done.code, done.err) == (CLOSED_PIPE, "")


@pytest.mark.parametrize("tool", [DRY_RUN, "evaluate.py", "hostfile.py", "plan.py", "shards.py", "tokenizer.py"])
def test_a_reader_that_leaves_before_the_answer(tools: Tools, words: dict[str, Any], tool: str) -> None:
    done = tools.call(f"tools/{tool}", *filled(NORMAL[tool], words, Path("new")), closed=True)
    assert (done.code, done.err) == (CLOSED_PIPE, "")


@pytest.mark.parametrize("tool", [DRY_RUN, *(tool for tool in NORMAL if tool != "dryrun.py")])
def test_a_normal_call_says_what_is_ours(tools: Tools, words: dict[str, Any], tmp_path: Path, tool: str) -> None:
    done = tools.call(f"tools/{tool}", *filled(NORMAL[tool], words, tmp_path))
    assert done.code == 0 and foreign_lines(done.err) == [], done.err
    if "--json" in NORMAL[tool]:
        assert json.loads(done.out)  # stdout holds nothing else
    else:
        assert done.out and "Warning" not in done.out


@pytest.mark.parametrize("words", ["map hostfiles/2x8 --tp 4", "map hostfiles/2x8 --tp 4 --json", "--help"])
def test_a_stdout_that_is_full_or_closed_is_no_traceback(words: str) -> None:
    """All tools print through `command_line.run`."""
    command = f"{sys.executable} tools/hostfile.py {words}"
    for redirection, code, error in (
        (">/dev/full", 2, "error: stdout: cannot be written (No space left on device)\n"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
    ):
        done = subprocess.run(
            ["sh", "-c", f"{command} {redirection}"], cwd=ROOT, capture_output=True, text=True, timeout=120,
            env=os.environ | {"PYTHONUNBUFFERED": ""},
        )  # fmt: skip
        assert (done.returncode, done.stderr, done.stdout) == (code, error, ""), redirection


def test_the_plan_of_a_training_may_be_left_unread(tools: Tools, words: dict[str, Any]) -> None:
    done = tools.call("llama_ds/train.py", words["run_file"], "--dry-run", closed=True)
    assert (done.code, done.err) == (CLOSED_PIPE, "")


def test_a_training_says_what_is_ours(words: dict[str, Any]) -> None:
    done: Finished = words["trained"]
    assert foreign_lines(done.out + done.err) == []


@pytest.mark.parametrize("tool", TOOLS)
def test_an_interruption_is_one_line(tools: Tools, words: dict[str, Any], tmp_path: Path, tool: str) -> None:
    started = tools.start(f"tools/{tool}", *filled(WAITING[tool], words, tmp_path))
    writer = when_read(words["waits"] / "pipe.yaml")
    os.kill(started.process.pid, signal.SIGINT)
    done = started.finish()
    os.close(writer)
    assert (done.code, done.err) == (INTERRUPTED, "interrupted\n")


def test_every_tool_ends_quietly_during_its_imports() -> None:
    """An import may take seconds, and turn KeyboardInterrupt into another exception: the handler comes first."""
    for tool in TOOLS:
        body = ast.parse((ROOT / "tools" / tool).read_text()).body
        modules = [node.module or "" if isinstance(node, ast.ImportFrom) else "" for node in body]
        first = next(place for place, name in enumerate(modules) if name.startswith(("llama_ds", "tqdm")))
        assert ast.unparse(body[first]) == "from llama_ds.command_line import end_on_interrupt", tool
        assert ast.unparse(body[first + 1]) == "if __name__ == '__main__':\n    end_on_interrupt()", tool


def test_an_interruption_during_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tqdm.py").write_text("import time\nprint('imports', flush=True)\ntime.sleep(600)\n")
    with subprocess.Popen(
        [sys.executable, ROOT / "tools" / "convert.py"], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    ) as process:  # fmt: skip
        assert process.stdout and process.stdout.readline() == "imports\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (INTERRUPTED, "interrupted\n")


def when_read(pipe: Path) -> int:
    """Return the write end of the pipe as soon as a reader has opened it."""
    until = time.monotonic() + 60
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            assert error.errno == errno.ENXIO and time.monotonic() < until, "no reader opened the pipe"
            time.sleep(0.01)


def test_an_interruption_ends_the_ranks_too(tools: Tools) -> None:
    started = tools.start("tools/pipeline.py", "--pp", 2, "--schedules", "1f1b")
    ranks = when_started(started.process.pid, 2)
    os.kill(started.process.pid, signal.SIGINT)
    done = started.finish()
    assert (done.code, done.err) == (INTERRUPTED, "interrupted\n")
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.parametrize(("grace_s", "number"), [(30, signal.SIGINT), (30, signal.SIGTERM), (0.2, signal.SIGHUP)])
def test_a_child_and_its_own_end_with_the_tool(tmp_path: Path, grace_s: float, number: int) -> None:
    """With a short grace period the children ignore SIGTERM and must be killed."""
    trap = "trap '' TERM;" if grace_s < 1 else ""
    command = ["sh", "-c", f"{trap} sleep 99 & sleep 99; true"]
    program = (  # a shell may have started the tests without SIGINT
        "import signal; from llama_ds.child_processes import run_child; "
        f"signal.signal(signal.SIGINT, signal.default_int_handler); run_child({command}, {grace_s})"
    )
    tool = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    (shell,) = when_started(tool.pid, 1)
    children = [shell, *when_started(shell.pid, 2)]
    tool.send_signal(number)
    assert tool.wait(30) in (1, -signal.SIGINT)  # the tool ends by KeyboardInterrupt
    assert not psutil.wait_procs(children, timeout=30)[1], "orphans are the system's to reap, in its own time"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_child_is_created_ends_the_child(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    created: list[subprocess.Popen[str]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            created.append(self)
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # Python's handlers run between two instructions

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_child(["sleep", "99"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert created[0].poll() is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_was_started_is_ended_on_termination_signals(number: int) -> None:
    before, ended = signal.getsignal(number), list[str]()
    with pytest.raises(KeyboardInterrupt), ended_like_ctrl_c(), ExitStack() as started:
        started.callback(ended.append, "ranks")
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    assert ended == ["ranks"] and signal.getsignal(number) == before


def when_started(process: int, count: int) -> list[psutil.Process]:
    """Return the children of a process as soon as it has `count`."""
    until = time.monotonic() + 60
    while len(children := psutil.Process(process).children()) < count:
        assert time.monotonic() < until
        time.sleep(0.01)
    return children


def test_a_child_prints_nothing_into_the_answer() -> None:
    """A program that reads --json would find the line of a child, or of a library in C, before the answer."""
    code = (
        "import os, sys; from llama_ds.command_line import Answer, add_json, new_parser, run; "
        "parser = new_parser(lambda _: os.system('echo a child') or Answer([1], ''), '', ''); "
        "add_json(parser); sys.exit(run(parser, ['--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[\n 1\n]\n", "a child\n")


def test_an_interrupt_waits_for_the_start_of_a_process_in_whichever_thread_it_arrives() -> None:
    """Otherwise it may end the start half-way, and the child prints a traceback."""
    done = threading.Event()
    other = threading.Thread(target=done.wait, daemon=True)
    other.start()
    passed = False
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt), without_interrupts():
            signal.pthread_kill(other.ident or 0, signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.05)
            passed = True
    finally:
        signal.signal(signal.SIGINT, before)
        done.set()
    assert passed
