"""What a host says of itself: this file is sent to `python -I -` there. Standard library only; prints JSON."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

GPU_FIELDS = (
    "index,name,driver_version,ecc.errors.uncorrected.volatile.total,temperature.gpu,"
    "clocks_throttle_reasons.active,memory.total,uuid"
)

ANSWERS = {
    *("time", "address", "hostname", "python", "executable", "packages", "code", "free", "unwritable", "shared"),
    *("missing", "nics", "cores", "gpus", "xids"),
}


def code_digest(root: str) -> str:
    """Return a digest over the project's Python files."""
    digest = hashlib.sha256()
    found = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(os.path.join(root, "llama_ds"))
        for name in names
        if name.endswith(".py")
    )
    for path in found:
        digest.update(os.path.relpath(path, root).encode() + b"\0")
        with open(path, "rb") as file:
            digest.update(hashlib.sha256(file.read()).digest())
    return digest.hexdigest()[:16] if found else "absent"


def packages() -> dict[str, str]:
    """Return the installed distributions and their versions."""
    return {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}


def free(path: str) -> int | None:
    """Return the bytes free where `path` is or would be made."""
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def writable(path: str) -> str | None:
    """Return why nothing can be written in a folder, None when it can."""
    name = os.path.join(path, f".preflight-{socket.gethostname()}-{os.getpid()}")
    try:
        with open(name, "wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        os.unlink(name)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        return error.strerror or str(error)
    return None


def gpus() -> dict | None:
    """Return what nvidia-smi says, None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"problem": str(error)}
    if done.returncode:
        return {"problem": (done.stdout + done.stderr).strip()[:300]}
    names = GPU_FIELDS.split(",")
    rows = [
        dict(zip(names, (v.strip() for v in line.split(",")), strict=False))
        for line in done.stdout.splitlines()
        if line.strip()
    ]
    return {"devices": rows}


def xids() -> list[str]:
    """Return the Xid lines of the kernel's log, as far as it may be read."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"NVRM: Xid[^\n]*", done.stdout)[-5:]


def nics() -> dict[str, str]:
    """Return the state of each network interface."""
    found = {}
    for _, name in socket.if_nameindex():
        try:
            with open(f"/sys/class/net/{name}/operstate") as file:
                found[name] = file.read().strip()
        except OSError:
            found[name] = "unknown"
    return found


def main() -> None:
    """Answer the request that the sender put before this file."""
    wanted = json.loads(REQUEST)  # type: ignore[name-defined]  # noqa: F821
    signal.alarm(int(wanted["timeout_s"]) + 5)  # a killed ssh does not kill what it started
    shared = {}
    for path in wanted["shared"]:
        try:
            with open(path) as file:
                shared[path] = file.read().strip()
        except OSError as error:
            shared[path] = f"error: {error.strerror}"
    answer = {
        "time": time.time(),
        "address": (os.environ.get("SSH_CONNECTION", "").split() or ["", "", "127.0.0.1"])[2],
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": packages(),
        "code": code_digest(wanted["root"]),
        "free": {path: free(path) for path in wanted["folders"]},
        "unwritable": {path: why for path in wanted["folders"] if (why := writable(path)) and os.path.isdir(path)},
        "shared": shared,
        "missing": [path for path in wanted["files"] if not os.path.exists(path)],
        "nics": nics(),
        "cores": os.cpu_count(),
        "gpus": gpus(),
        "xids": xids(),
    }
    sys.stdout.write("\n<preflight>" + json.dumps(answer) + "</preflight>\n")


if __name__ == "__main__":
    main()
