"""What the supervisor does on a host, over ssh: this file is sent to `python -I -` there. Standard library only.

It finds the processes of one job by the variable that all of them have in their environment, looks at them, has their
stacks written, or kills them. Processes without it are never touched.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

SURE_S = 8.0  # to see that what was killed is gone


def processes(variable: str, prefix: str) -> dict[int, dict]:
    """Return this user's processes whose `variable` is the folder `prefix` or one in it: pid -> what it is."""
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
        except (OSError, IndexError, ValueError):  # it has just ended
            continue
    return found


def look(variable: str, prefix: str, stacks: bool) -> dict:
    """Say which processes there are, and what those that hang wait for in the kernel; have ranks write their stacks."""
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
    """Tell whether a process has a handler for a signal; one that has none would die of it."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        caught = next(line for line in file if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def kill(variable: str, prefix: str) -> dict:
    """Kill the job's processes, by process group where a whole group is the job's, and see that they are gone."""
    killed: dict[int, str] = {}
    deadline = time.monotonic() + SURE_S
    while True:
        found = processes(variable, prefix)
        if not found or time.monotonic() > deadline:
            return {"killed": killed, "left": found}
        for pid, about in found.items():
            killed[pid] = about["command"]
            try:
                # The recorded group: children that have not got the variable, or not yet, go with it.
                if about["group"] in found:
                    os.killpg(about["group"], signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        time.sleep(0.1)


def main() -> None:
    """Do what the line after this file asks for, and print the answer."""
    wanted = json.loads(REQUEST)  # type: ignore[name-defined]  # noqa: F821 (put before this file by the sender)
    signal.alarm(60)  # nobody kills it when its ssh is gone
    if wanted["do"] == "kill":
        answer = kill(wanted["variable"], wanted["folder"])
    else:
        answer = look(wanted["variable"], wanted["folder"], wanted["do"] == "stacks")
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
