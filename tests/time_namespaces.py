"""Hosts whose monotonic clocks differ by thousands of seconds, on one machine: Linux time namespaces. Needs root."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence


def missing() -> str | None:
    """Return the reason why this machine cannot create such hosts, or None."""
    if sys.platform != "linux" or os.geteuid() != 0 or not os.path.exists("/proc/self/ns/time"):
        return "root on Linux with time namespaces is needed for hosts with clocks of their own"
    if not shutil.which("unshare"):
        return "not installed: util-linux"
    tried = subprocess.run(ahead(1, [["true"]]), capture_output=True, text=True, check=False)
    return f"time namespaces cannot be made here: {tried.stderr.strip()}" if tried.returncode else None


def ahead(seconds: int, commands: Sequence[Sequence[str]]) -> list[str]:
    """Return a command that runs `commands` in parallel on a host whose monotonic clock is `seconds` ahead.

    It fails if one of them fails.
    """
    started = " ".join(f'{shlex.join(command)} & pids="$pids $!";' for command in commands)
    script = f"pids=; {started} for pid in $pids; do wait $pid || exit 1; done"
    return ["unshare", "--time", "--monotonic", str(seconds), "--fork", "sh", "-c", script]


def run_hosts(hosts: dict[int, list[list[str]]], environment: dict[str, str], timeout_s: float) -> list[str]:
    """Run commands on hosts, given by their clock's offset in seconds; return the outputs. All must succeed."""
    processes = [
        subprocess.Popen(
            ahead(seconds, commands), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for seconds, commands in hosts.items()
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return outputs
