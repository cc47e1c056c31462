"""The preflight of all hosts in parallel. A host that hangs or answers garbage does not delay the others."""

from __future__ import annotations

import json
import os
import platform
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama_ds.errors import UserError
from llama_ds.launch import remote
from llama_ds.launch.preflight import answer, measure, probe
from llama_ds.launch.preflight.checks import HostFinding, LaunchingMachine, judge
from llama_ds.launch.rendezvous import is_loopback, own_address_towards

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class PreflightSettings:
    """Settings of the preflight."""

    output_dir: str = "runs"  # must be the same folder on all hosts
    cache_dir: str = ""
    files: Sequence[str] = ()  # files required on every host
    min_free_gib: float = 1.0  # minimum free space for checkpoints, shards and temporary files
    timeout_s: float = 20.0  # timeout for a host's answer
    nic: str = ""
    ssh_port: int | None = None
    fp8: bool = False  # whether the run multiplies in float8
    measure: bool = False  # whether to load the devices and time all-reduces
    burn_s: float = 2.0
    slow: str = "warning"  # severity of a slow device or link: warning | error


@dataclass
class Report:
    """The result of a preflight."""

    hosts: list[str]
    findings: list[HostFinding]
    speeds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def good(self) -> list[str]:
        """The hosts without an error, in the order of `hosts`."""
        bad = {finding.host for finding in self.findings if finding.severity == "error"}
        return [host for host in self.hosts if host not in bad]

    def speed_lines(self) -> list[str]:
        """Return a summary of the measured speeds of devices and links."""
        devices = {f"{host}:{i}": one["tflops"] for host, slots in self.speeds.items() for i, one in enumerate(slots)}
        links = {host: measure.link(found) for host, found in self.speeds.items()}
        kinds = (("devices multiply", "TFLOP/s", devices), ("hosts all-reduce in pairs", "GB/s", links))
        return [
            f"{what} at {statistics.median(values.values()):.3g} {unit} (median of {len(values)}; "
            f"slowest {min(values, key=values.__getitem__)} {min(values.values()):.3g}, "
            f"fastest {max(values, key=values.__getitem__)} {max(values.values()):.3g})"
            for what, unit, values in kinds
            if any(values.values())
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the complete report."""
        return {"good": self.good, "findings": [asdict(f) for f in self.findings], "speeds": self.speeds}


def examine(
    hosts: Mapping[str, int], settings: PreflightSettings, progress: Callable[[str], None] | None = None
) -> Report:
    """Check all hosts and return a report of their problems."""
    print_line = progress or (lambda text: None)
    findings: list[HostFinding] = []
    with shared_file(settings.output_dir) as nonce, ThreadPoolExecutor(1) as beside:
        own_packages = beside.submit(probe.packages)
        ends, answers = _ask(hosts, settings, list(nonce), print_line)
        own = LaunchingMachine(platform.python_version(), own_packages.result(), probe.code_digest(str(ROOT)), nonce)
    values: dict[str, dict[str, Any]] = {}
    for host, reply in answers.items():
        value = answer.read(reply.out, "preflight", answer.ANSWER)
        if reply.problem or value is None:
            problem = reply.problem or f"answers {reply.out[:40]!a} instead of what it was asked"
            fix = "fix its ssh, its Python or its shell's start files, or leave it out"
            findings.append(HostFinding(host, "answer", "error", f"{problem}; {fix}"))
            continue
        value["skew_s"], value["skew_bound_s"] = value["time"] - ends[host] + reply.seconds / 2, reply.seconds / 2
        values[host] = value
    findings += judge(values, own, hosts, settings)
    report = Report(list(hosts), findings)
    if settings.measure and report.good:
        good = {host: hosts[host] for host in report.good}
        addresses = _addresses({host: values[host]["address"] for host in good})
        report.speeds, slow = measure.measure(
            good, addresses, settings.burn_s, settings.ssh_port, settings.slow, print_line
        )
        report.findings += slow
    positions = {host: position for position, host in enumerate(hosts)}
    report.findings.sort(key=lambda finding: positions[finding.host])
    return report


def _ask(
    hosts: Mapping[str, int], settings: PreflightSettings, shared: list[str], print_line: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, remote.HostAnswer]]:
    """Return the time of each host's answer, and the answers."""
    ends: dict[str, float] = {}

    def done(reply: remote.HostAnswer) -> None:
        ends[reply.host] = time.time()
        if len(ends) * 10 // len(hosts) > (len(ends) - 1) * 10 // len(hosts):
            print_line(f"{len(ends)} of {len(hosts)} hosts have answered")

    argv = [sys.executable, "-I", "-"]
    return ends, remote.on_hosts(
        list(hosts), argv, question(settings, shared), settings.timeout_s, settings.ssh_port, done
    )


def question(settings: PreflightSettings, shared: Sequence[str]) -> bytes:
    """Return the script to send to a host's Python; the host reads the files `shared`."""
    folders = [os.path.abspath(settings.output_dir), "/tmp", "/dev/shm"]
    folders += [settings.cache_dir] if settings.cache_dir else []
    request = {
        "root": str(ROOT),
        "folders": folders,
        "shared": list(shared),
        "files": list(settings.files),
        "timeout_s": settings.timeout_s,
    }
    return remote.script_with(Path(probe.__file__), json.dumps(request))


@contextmanager
def shared_file(folder: str) -> Iterator[dict[str, str]]:
    """A context in which `folder` contains a file with a random text; yields {path: text}."""
    path, text = os.path.join(os.path.abspath(folder), f".preflight-{secrets.token_hex(8)}"), secrets.token_hex(8)
    try:
        os.makedirs(folder, exist_ok=True)
        Path(path).write_text(text)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written here ({error.strerror}); set output_dir to another") from None
    try:
        yield {path: text}
    finally:
        with suppress(OSError):
            os.unlink(path)


def _addresses(found: Mapping[str, str]) -> dict[str, str]:
    """Return the addresses of hosts for each other; this machine, asked without ssh, has named a loopback address."""
    other = next((address for address in found.values() if not is_loopback(address)), "")
    own = own_address_towards(other) if other else None
    return {host: own if own and is_loopback(address) else address for host, address in found.items()}
