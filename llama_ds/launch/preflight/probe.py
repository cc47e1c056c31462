"""What a host says of itself: this file is sent to `python -I -` there. Standard library only; prints JSON.

Nothing here may need a newer Python than a host is likely to have: one with the wrong Python is to say so.
"""

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

GPU_FIELDS = (  # of nvidia-smi, but for "slowdown"
    *("index", "name", "driver_version", "memory.total", "temperature.gpu"),
    *("ecc.errors.uncorrected.volatile.total", "slowdown", "uuid"),
)
SLOWDOWN = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # since driver 535, and before
MOST_XIDS = 20  # the newest
# Parts of the time for the whole answer, after which a host can still say that these have hung.
SMI_SHARE, DMESG_SHARE = 0.5, 0.2


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
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]  # None where an installation was cut short
        if name:
            found[name.lower().replace("_", "-")] = distribution.version or "of no version"
    return found


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


def gpus(timeout_s: float) -> dict | None:
    """Return what nvidia-smi says of each GPU, or its problem; None where there is no nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return None
    until = time.monotonic() + timeout_s
    for slowdown in SLOWDOWN:
        fields = ",".join(slowdown if name == "slowdown" else name for name in GPU_FIELDS)
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            done = _run(command, max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            return {"problem": f"no answer within {timeout_s:.0f} s"}
        except OSError as error:
            return {"problem": str(error)}
        if "not a valid field" not in done.stdout + done.stderr:
            break
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    rows = [[value.strip() for value in line.split(",")] for line in lines]
    fit = [len(row) == len(GPU_FIELDS) and row[0].isdigit() for row in rows]
    if done.returncode or not all(fit):  # of eight GPUs of which one is lost it may list seven, and fail
        said = "; ".join(line for i, line in enumerate(lines) if not fit[i])[:300]
        return {"problem": said or f"exit code {done.returncode}"}
    return {"devices": [{name: row[i] for i, name in enumerate(GPU_FIELDS)} for row in rows]}


def xids(timeout_s: float) -> list[dict]:
    """Return the Xid lines of the kernel's log, as far as it may be read, and how long ago each was written."""
    try:
        log = _run(["dmesg"], timeout_s).stdout
        with open("/proc/uptime") as file:
            uptime = float(file.read().split()[0])
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^(?:\[\s*(\d+\.\d+)\])?.*?(NVRM: Xid.*)$", log, re.MULTILINE)[-MOST_XIDS:]
    return [{"age_s": uptime - float(stamp) if stamp else None, "text": text[:200]} for stamp, text in found]


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
        "gpus": gpus(SMI_SHARE * wanted["timeout_s"]),
        "xids": xids(DMESG_SHARE * wanted["timeout_s"]),
        "time": time.time(),
    }
    sys.stdout.write("\n<preflight>" + json.dumps(answer) + "</preflight>\n")


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s)


if __name__ == "__main__":
    main()
