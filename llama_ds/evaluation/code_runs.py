"""Running generated programs: each in a process of its own with little time, memory and room, and where the kernel
lets it without a network.

This keeps mistakes of a model from the machine. It does not hold a determined attacker: use a virtual machine for that.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache

from llama_ds.log import logger

SECONDS = 5.0  # limit of wall-clock time, and of CPU time
MEMORY_MIB, FILE_MIB, FILES, PROCESSES = 2048, 16, 64, 64

# The child limits itself, runs the program from stdin and writes the word of the parent. A program that ends early, by
# any exit code, does not reach that line, and does not know the word.
_CHILD = f"""
import ctypes, os, resource, sys
word, where = sys.argv[1:]
CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000
libc = ctypes.CDLL(None, use_errno=True)
alone = libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0 or libc.unshare(CLONE_NEWNET) == 0
if word == "probe":
    sys.exit(not alone)
def limit(kind, value):
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
limit(resource.RLIMIT_CPU, {int(SECONDS)})
limit(resource.RLIMIT_AS, {MEMORY_MIB} << 20)
limit(resource.RLIMIT_FSIZE, {FILE_MIB} << 20)
limit(resource.RLIMIT_NOFILE, {FILES})
limit(resource.RLIMIT_NPROC, {PROCESSES})
limit(resource.RLIMIT_CORE, 0)
os.chdir(where)
program, answer = sys.stdin.read(), os.dup(1)
nothing = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nothing, stream)
sys.argv = ["program.py"]
exec(compile(program, "program.py", "exec"), {{"__name__": "__main__"}})
os.write(answer, word.encode())
"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Return whether a Python program runs to its end without an error within `seconds`."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="llama_ds-program-") as folder:
        process = _start(word, folder)
        try:
            output, _ = process.communicate(program.encode(errors="surrogatepass"), timeout=seconds)
        except subprocess.TimeoutExpired:
            output = b""
        finally:
            with suppress(ProcessLookupError):  # and all that it has started in its session
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return output == word.encode()


def all_pass(programs: Sequence[str]) -> list[bool]:
    """Return of each program whether it passes; as many run at once as there are CPUs."""
    if not has_no_network():
        logger.warning("generated programs run with this machine's network: the kernel refuses a network namespace")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(passes, programs))


@cache
def has_no_network() -> bool:
    """Return whether programs run without a network here."""
    return _start("probe", ".").wait() == 0


def _start(word: str, folder: str) -> subprocess.Popen[bytes]:
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder}
    command = [sys.executable, "-I", "-c", _CHILD, word, folder]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    )  # fmt: skip
