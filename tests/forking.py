"""The server behind `tests/warm.py`: forks processes from itself, which has torch, DeepSpeed and llama_ds imported.

    python forking.py SOCKET

SOCKET is the number of a socket that this was started with, or the path of one to listen at: then each connection has a
process of its own, with the priority of who connects, and all is over when stdin ends. Each message is a `Request` as
JSON with three open files: for stdout, for stderr, and for the answers, which are a process id and later an exit code,
a line each. When the other end of the socket closes, what still runs is killed.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

# What ranks and tools import sooner or later, in four seconds.
HEAVY = (
    *("deepspeed", "deepspeed.module_inject.auto_ep_layer", "torch._dynamo", "sentencepiece", "tiktoken"),
    *("transformers.models.llama.modeling_llama", "transformers.models.llama.tokenization_llama"),
)
# With what these import, most of this project: half a second of each rank. Nothing in it looks at its process then.
OURS = (
    *("llama_ds.training.loop", "llama_ds.training.engines.pipelined", "llama_ds.training.dry_run.processes"),
    *("llama_ds.checkpoint.conversion.convert", "llama_ds.evaluation.evaluate", "llama_ds.perf.plan.search"),
)
MAX_REQUEST = 1 << 20  # bytes


@dataclass(frozen=True)
class Request:
    """A command; with `ranks`, so many processes that find one another through the environment."""

    words: list[str]  # what would follow `python`
    environment: dict[str, str]
    folder: str  # to run in
    ranks: int = 0
    port: int = 0


def main() -> None:
    """Serve until the other end of the socket closes; in each forked process, run what was asked for."""
    where = sys.argv[1]
    if where.isdigit():
        preload()
        request = serve(socket.socket(fileno=int(where)))
    else:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(where)
        listener.listen()  # clients that connect meanwhile wait
        preload()
        request = serve(accepted(listener))
    if not request:
        os._exit(0)  # to take modules apart would take a second
    os.environ.clear()
    os.environ.update(request.environment)
    read_again()
    os.chdir(request.folder)
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))  # lines at once are near enough to it
    sys.stdout = open(1, "w", buffering=1 if unbuffered else -1, closefd=False)  # noqa: SIM115
    if request.ranks:
        launch(request.ranks, request.port)
    run(request.words)


def accepted(listener: socket.socket) -> socket.socket:
    """Fork a process for each connection and return the connection in it; end with stdin."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:  # nobody writes to it
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            client, *_ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, client))
            return connection
        connection.close()


def preload() -> None:
    """Import what ranks would, of this project from the checkout that this file is in."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for name in (*HEAVY, *OURS):
        importlib.import_module(name)
    del sys.path[0]
    # Each engine asks it what can be compiled, and it runs a compiler to know.
    assert importlib.import_module("deepspeed.ops").__compatible_ops__
    gc.collect()
    gc.freeze()  # or each process would look through a million objects, and copy their pages, in vain


def read_again() -> None:
    """Let libraries that have read a variable while they were imported go by the value it has now."""
    compiler = importlib.import_module("torch._dynamo.config")
    compiler.disable = os.environ.get("TORCH_COMPILE_DISABLE") == "1"  # type: ignore[attr-defined]


def serve(requests: socket.socket) -> Request | None:
    """Fork a process for each request and answer how it ends; return the request in the forked process."""
    answers: dict[int, int] = {}  # process, file
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            woken.recv(4096)
            answer(answers)
        if requests not in ready:
            continue
        message, files, *_ = socket.recv_fds(requests, MAX_REQUEST, 3)
        if not message:
            break
        if pid := os.fork():
            answers[pid] = files.pop()
            os.write(answers[pid], f"{pid}\n".encode())
        else:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests without it
            os.dup2(files[0], 1)
            os.dup2(files[1], 2)
            files += [*answers.values(), requests.detach(), woken.detach(), wake.detach()]
        for file in files:
            os.close(file)
        if not pid:
            return Request(**json.loads(message))
    for pid in answers:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return None


def answer(answers: dict[int, int]) -> None:
    """Answer how those processes ended that have."""
    for pid in list(answers):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            file = answers.pop(pid)
            with suppress(BrokenPipeError):
                os.write(file, f"{os.waitstatus_to_exitcode(status)}\n".encode())
            os.close(file)


def launch(count: int, port: int) -> None:
    """Fork ranks and return in them; exit with the code of the first that fails, and end the others then."""
    pids = set()
    for rank in range(count):
        if not (pid := os.fork()):
            size, own = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}, {"RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in (size | own).items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            return
        pids.add(pid)
    first = 0
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        if status and not first:
            first = os.waitstatus_to_exitcode(status)
            for other in pids:
                os.kill(other, signal.SIGTERM)
    os._exit(first % 256)


def run(words: Sequence[str]) -> NoReturn:
    """Run `python WORDS` in this process: a script, or a module after -m.

    It ends as Python does, but for taking modules apart, which would cost more than two seconds of what was imported.
    """
    try:
        if words[0] == "-m":
            sys.argv, sys.path[0] = list(words[1:]), os.getcwd()
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = list(words), os.path.dirname(words[0])
            runpy.run_path(words[0], run_name="__main__")
        code: object = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code) % 256)  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
