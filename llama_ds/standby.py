"""Keeps a host ready for a restart: this process has imported what ranks need, and forks them from itself.

The supervisor starts it on each host of a job (`launch/supervise/standbys.py`), writes requests to its stdin and reads
answers from its stdout, each a line of JSON:

    {"do": "start", "folder", "argv", "log", "environment", "ranks": [{"RANK": "0", ...}, ...]}
    {"do": "ping"}                          only to be heard
    {"what": "ready", "seconds", "mib"}     once all is imported, and a forked process has computed
    {"what": "started", "ranks": {"0": PID, ...}}
    {"what": "exited", "pid", "code"}
    {"what": "problem", "text"}             it cannot serve; the process ends

It ends when stdin ends, or when it has heard nothing for a time. The ranks do not need it and go on: they have their
own connection to the supervisor.

    python -u standby.py SILENCE_S
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # not the script's folder, as in train.py

from llama_ds.job import devices
from llama_ds.job.folder import VARIABLE
from llama_ds.job.shown_process import ROOM, replace_process, restart_with_room

# What a rank imports until its first step, besides DeepSpeed.
IMPORTS = (
    *("torch._dynamo", "torch.profiler._cupti_monitor", "numpy.random", "numpy.ma", "encodings.idna"),
    *("deepspeed.comm.mori", "deepspeed.runtime.zero.muon.muon_optimizer", "multiprocessing.synchronize"),
    *("llama_ds.training.loop", "llama_ds.training.run_in_use", "llama_ds.training.self_test.check"),
    *("llama_ds.checkpoint.model_shape", "llama_ds.launch.hostfile"),
    *("llama_ds.command_line", "llama_ds.job.launcher_watch"),
)
# torch then counts devices by NVML: the CUDA driver cannot be used in a process that is forked from one that used it.
BY_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
PROBE_S = 60.0  # for a forked process to compute something


def main() -> None:
    """Serve until stdin ends."""
    begin = time.monotonic()
    answers, shown = os.dup(1), dict(os.environ)
    os.dup2(2, 1)  # what imports print is no answer
    os.environ.setdefault(BY_NVML, "1")
    gc.disable()  # modules leave no garbage
    importlib.import_module("llama_ds.parallel.preload").preload()
    for name in IMPORTS:
        with suppress(ModuleNotFoundError):  # some are modules of one version of torch or DeepSpeed
            importlib.import_module(name)
    importlib.import_module("llama_ds.training.machines").packages()
    gc.enable()
    gc.freeze()  # a collection would write to memory that ranks share
    problem = probe()
    if problem:
        say(answers, what="problem", text=problem)
        return
    say(answers, what="ready", seconds=round(time.monotonic() - begin, 2), mib=round(own_memory() / 2**20))
    of_an_attempt = (ROOM, VARIABLE, devices.VARIABLE)  # each attempt gives its ranks its own, or none
    kept = {name: value for name, value in shown.items() if name not in of_an_attempt}
    serve(answers, kept, float(sys.argv[1]))


def probe() -> str:
    """Return why a process that is forked from this one cannot compute, or "". A process of its own tries."""
    if not (pid := os.fork()):
        os._exit(_compute())
    deadline = time.monotonic() + PROBE_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return {0: "", 3: "imports have used the CUDA driver"}.get(code, f"a forked process ended with code {code}")
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"a forked process did not compute within {PROBE_S:.0f} s"


def _compute() -> int:
    torch = importlib.import_module("torch")
    with suppress(OSError):
        if ctypes.CDLL("libcuda.so.1").cuInit(0) == 3:  # CUDA_ERROR_NOT_INITIALIZED: this process was forked too late
            return 3
    ones = torch.ones(256, 256)
    return 0 if float((ones @ ones).sum()) == 256.0**3 else 1


def own_memory() -> int:
    """Return the bytes of memory that this process alone holds."""
    with open("/proc/self/smaps_rollup", encoding="utf-8") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Private_"))


def serve(answers: int, environment: Mapping[str, str], silence_s: float) -> None:
    """Start ranks as asked, and say how they end. Returns when nothing more is heard."""
    ranks: set[int] = set()  # process ids
    woken, wake = os.pipe()
    own_files = (answers, woken, wake)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    buffer = b""
    while True:
        ready, _, _ = select.select([0, woken], [], [], silence_s)
        if not ready:
            return
        if woken in ready:
            os.read(woken, 4096)
            for pid in list(ranks):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    ranks.remove(pid)
                    say(answers, what="exited", pid=pid, code=os.waitstatus_to_exitcode(status))
        if 0 in ready:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                return
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                request = json.loads(line)
                if request["do"] == "start":
                    started = start_all(request, environment, own_files)
                    ranks |= set(started.values())
                    say(answers, what="started", ranks=started)


def say(answers: int, **values: Any) -> None:
    """Send an answer."""
    os.write(answers, json.dumps(values).encode() + b"\n")


def start_all(request: Mapping[str, Any], environment: Mapping[str, str], files: Sequence[int]) -> dict[int, int]:
    """Fork the ranks of a request; return their process ids once /proc shows their environments, for who kills them."""
    started, shown = dict[int, int](), list[int]()
    for own in request["ranks"]:
        seen, tell = os.pipe()
        started[int(own["RANK"])] = start(request, own, environment, (*files, *shown, seen, tell))
        os.close(tell)
        shown.append(seen)
    for seen in shown:
        os.read(seen, 1)  # it ends once the rank has closed its other end
        os.close(seen)
    return started


def start(
    request: Mapping[str, Any], own: Mapping[str, str], environment: Mapping[str, str], files: Sequence[int]
) -> int:
    """Fork a rank and return its process id. The rank closes `files` once /proc shows its environment."""
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        shown = [sys.executable, "-u", *request["argv"]]
        replace_process(shown, {**environment, **request["environment"], **own})
        _connect(request["log"], files)
        os.chdir(request["folder"])
    except BaseException as error:
        os.write(2, f"error: rank {own['RANK']}: cannot be started from a warm process ({error})\n".encode())
        os._exit(1)
    run(request["argv"])


def _connect(log: str, files: Sequence[int]) -> None:
    """Connect this process with nothing but its log, and close `files`."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, number in ((nothing, 0), (target, 1), (target, 2)):
        os.dup2(source, number)
    for file in (nothing, target, *files):
        os.close(file)


def run(argv: list[str]) -> NoReturn:
    """Run a script with its arguments as `python` would, and end this process."""
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
        code: object = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    os._exit(code % 256 if isinstance(code, int) else 1)


if __name__ == "__main__":
    restart_with_room()
    with suppress(BrokenPipeError):  # the supervisor has ended
        main()
