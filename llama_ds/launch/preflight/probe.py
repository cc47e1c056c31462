"""The probe of a host: this file is sent over ssh to `python -I -`, and prints JSON. Standard library only.

It must run under old Python versions, so that a host with the wrong Python can report it.
"""

from __future__ import annotations

import contextlib
import email.parser
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

GPU_FIELDS = (  # fields of nvidia-smi; "slowdown" stands for one of SLOWDOWN
    *("index", "name", "driver_version", "memory.total", "temperature.gpu"),
    *("ecc.errors.uncorrected.volatile.total", "slowdown", "uuid"),
)
SLOWDOWN = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # since driver 535; before
MAX_XIDS = 20  # number of newest Xids that are reported
# Fractions of the host's timeout: a hanging nvidia-smi or dmesg leaves enough time to report it.
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
    """Return the installed distributions and their versions, without those that setuptools brings along."""
    found = {}
    read = email.parser.HeaderParser().parsestr  # `distribution.metadata` would parse each package's README as well
    for distribution in importlib.metadata.distributions(path=[path for path in sys.path if "_vendor" not in path]):
        about = read(distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "")
        name = about["Name"]  # None after an interrupted installation
        if name:
            found[name.lower().replace("_", "-")] = about["Version"] or "without a version"
    return found


def free(path: str) -> int | None:
    """Return the free bytes of the disk on which `path` is or would be created."""
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def writable(path: str) -> str | None:
    """Return the reason why a folder is not writable, or None."""
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
    """Return nvidia-smi's fields of each GPU, or its error; None without nvidia-smi."""
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
    if done.returncode or not all(fit):  # if one GPU is lost, it may list the others and fail
        message = "; ".join(line for i, line in enumerate(lines) if not fit[i])[:300]
        return {"problem": message or f"exit code {done.returncode}"}
    return {"devices": [{name: row[i] for i, name in enumerate(GPU_FIELDS)} for row in rows]}


def xids(timeout_s: float) -> list[dict]:
    """Return the Xid lines of the kernel log with their ages; none if the log is not readable."""
    try:
        log = _run(["dmesg"], timeout_s).stdout
        with open("/proc/uptime") as file:
            uptime = float(file.read().split()[0])
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^(?:\[\s*(\d+\.\d+)\])?.*?(NVRM: Xid.*)$", log, re.MULTILINE)[-MAX_XIDS:]
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
    """Answer the request in the constant REQUEST, which the sender has inserted."""
    request = json.loads(REQUEST)  # type: ignore[name-defined]  # noqa: F821
    signal.alarm(int(request["timeout_s"]) + 5)  # a killed ssh does not kill its remote processes
    shared = {}
    for path in request["shared"]:
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
        "code": code_digest(request["root"]),
        "free": {path: free(path) for path in request["folders"]},
        "unwritable": {path: why for path in request["folders"] if (why := writable(path)) and os.path.isdir(path)},
        "shared": shared,
        "missing": [path for path in request["files"] if not os.path.exists(path)],
        "nics": nics(),
        "cores": os.cpu_count(),
        "gpus": gpus(SMI_SHARE * request["timeout_s"]),
        "xids": xids(DMESG_SHARE * request["timeout_s"]),
        "time": time.time(),
    }
    sys.stdout.write("\n<preflight>" + json.dumps(answer) + "</preflight>\n")


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s)


if __name__ == "__main__":
    main()
