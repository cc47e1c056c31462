"""The supervisor's agent on a host: this file is sent over ssh to `python -I -`. Standard library only.

It finds the processes of one job by a variable in their environment, reports their states, requests their stacks, or
kills them. It never touches other processes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

KILL_TIMEOUT_S = 8.0  # time until all killed processes must have disappeared


def processes(variable: str, prefix: str) -> dict[int, dict]:
    """Return this user's processes, by pid, whose `variable` is the folder `prefix` or a folder in it."""
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            if os.stat(f"/proc/{name}").st_uid != os.getuid():
                continue
            with open(f"/proc/{name}/environ", "rb") as file:
                environment = file.read().split(b"\0")
            value = next((v for v in environment if v.startswith(variable.encode() + b"=")), b"").partition(b"=")[2]
            folder = value.decode(errors="surrogateescape")
            if folder != prefix and not folder.startswith(prefix + "/"):
                continue
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
            with open(f"/proc/{name}/cmdline", "rb") as file:
                command = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
            rank = next((v.partition(b"=")[2].decode() for v in environment if v.startswith(b"RANK=")), None)
            if fields[0] != "Z":
                found[int(name)] = {"state": fields[0], "group": int(fields[2]), "rank": rank, "command": command[:200]}
        except (OSError, IndexError, ValueError):  # the process has just exited
            continue
    return found


def look(variable: str, prefix: str, stacks: bool) -> dict:
    """Return the job's processes and where they wait in the kernel; optionally request the stacks of ranks."""
    found = processes(variable, prefix)
    for pid, about in found.items():
        try:
            with open(f"/proc/{pid}/wchan", encoding="utf-8") as file:
                about["waits_in"] = file.read()
            if stacks and about["rank"] is not None and about["state"] not in "Tt" and _handles(pid, signal.SIGUSR2):
                os.kill(pid, signal.SIGUSR2)
        except OSError:
            continue
    return {"processes": found}


def _handles(pid: int, number: int) -> bool:
    """Return whether a process handles a signal; without a handler the signal would kill it."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        caught = next(line for line in file if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def kill(variable: str, prefix: str, spare: dict[str, int] | None = None) -> dict:
    """Kill the job's processes, by process group where the group belongs to the job, until none is left.

    Ranks in `spare`, by their process ids, are not touched.
    """
    killed: dict[int, str] = {}
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while True:
        every = processes(variable, prefix)
        found = {pid: about for pid, about in every.items() if (spare or {}).get(about["rank"]) != pid}
        if not found or time.monotonic() > deadline:
            return {"killed": killed, "left": found}
        for pid, about in found.items():
            killed[pid] = about["command"]
            try:
                # The process group includes children without the variable, or that do not have it yet.
                if about["group"] in found:
                    os.killpg(about["group"], signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        time.sleep(0.1)


def main() -> None:
    """Execute the request in the constant REQUEST, and print the answer."""
    request = json.loads(REQUEST)  # type: ignore[name-defined]  # noqa: F821 (inserted by the sender)
    signal.alarm(60)  # a broken ssh connection does not kill this process
    if request["do"] == "kill":
        answer = kill(request["variable"], request["folder"], request["spare"])
    else:
        answer = look(request["variable"], request["folder"], request["do"] == "stacks")
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
