"""On what a run was trained, and by which code: machines.jsonl in its folder has a line for each start."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from email.parser import HeaderParser
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import torch

from llama_ds import __version__
from llama_ds.atomic_files import write_atomically
from llama_ds.layout.layout import Layout
from llama_ds.log import logger
from llama_ds.machine import cpu_name

PACKAGES = ("torch", "deepspeed", "flash-attn")
MOST_NAMES = 100
GIT_S = 20.0  # longest wait for git, on slow network file systems
CHECKOUT = Path(__file__).resolve().parents[2]


def machine_of(layout: Layout, device: torch.device, hosts: Sequence[str], run_dir: str) -> dict[str, Any]:
    """Return what machines.jsonl says of a start: ranks, device, hosts with their ranks, software, command line, code.

    Uncommitted changes of the code are written to `run_dir`, in a file that is named after their hash.
    """
    found = {"llama_ds": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "ranks": layout.world,
        "device": name,
        "versions": found,
        "hosts": Counter(hosts),
        "command": sys.argv,
        "code": code_of(run_dir),
        "packages": packages(),
    }


def begin_machine_of(*arguments: Any) -> Future[dict[str, Any]]:
    """Begin `machine_of` in a thread: other ranks would wait for git, and for the files of packages."""
    threads = ThreadPoolExecutor(1, "machine")
    found = threads.submit(machine_of, *arguments)
    threads.shutdown(wait=False)
    return found


@cache  # a warm process calls it, too; its ranks have the packages that it has imported
def packages() -> dict[str, str]:
    """Return the versions of all installed distributions by name, in alphabetical order."""
    read = HeaderParser().parsestr  # `one.name` and `one.version` would parse each package's README as well
    installed = distributions(path=[path for path in sys.path if "_vendor" not in path])  # without setuptools' own
    texts = [one.read_text("METADATA") or one.read_text("PKG-INFO") or "" for one in installed]
    found = {about["Name"]: about["Version"] for about in map(read, texts) if about["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def code_of(run_dir: str) -> dict[str, Any]:
    """Return the commit of this package's checkout and the file with its changes; {} if it is no checkout of git."""
    if not (CHECKOUT / ".git").exists():  # installed, or within a checkout of something else
        return {}
    try:
        code: dict[str, Any] = {"commit": _git("rev-parse", "HEAD").decode().strip()}
        if untracked := _git("ls-files", "--others", "--exclude-standard", "-z").decode(errors="replace"):
            names = untracked.rstrip("\0").split("\0")  # data may lie there too
            code["untracked"] = names[:MOST_NAMES] + [f"and {len(names) - MOST_NAMES} more"] * (len(names) > MOST_NAMES)
        if changes := _git("diff", "HEAD", "--binary"):
            code["changes"] = f"code_{hashlib.sha256(changes).hexdigest()[:12]}.diff"
            write_atomically(os.path.join(run_dir, code["changes"]), changes)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("the version of the code is not recorded (%s); the run continues", error)
        return {}
    return code


def _git(*words: str) -> bytes:
    """Return git's answer on the checkout; it takes no locks, because other jobs may start from the same checkout."""
    command = ["git", "--no-optional-locks", "-C", str(CHECKOUT), *words]
    # A checkout of another user is as good: git is only asked.
    environment = os.environ | {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory"}
    environment["GIT_CONFIG_VALUE_0"] = str(CHECKOUT)
    return subprocess.run(command, env=environment, capture_output=True, check=True, timeout=GIT_S).stdout
