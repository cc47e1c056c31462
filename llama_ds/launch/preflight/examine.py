"""Asking all hosts at once. A host that hangs or answers garbage costs its own time-out, and nobody else's."""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama_ds.errors import UserError
from llama_ds.launch import remote
from llama_ds.launch.preflight import measure, probe
from llama_ds.launch.preflight.checks import Finding, Own, judge

ROOT = Path(__file__).resolve().parents[3]
_ANSWER = re.compile(r"<preflight>(\{.*?\})</preflight>\s*$", re.DOTALL)


@dataclass(frozen=True)
class Settings:
    """What is looked at."""

    output_dir: str = "runs"  # must be one folder for all hosts
    cache_dir: str = ""
    files: Sequence[str] = ()  # that every host needs
    min_free_gib: float = 1.0  # where checkpoints, shards and temporary files go
    timeout_s: float = 20.0  # for a host to answer
    nic: str = ""
    ssh_port: int | None = None
    measure: bool = False  # burn the devices and time all-reduces
    burn_s: float = 2.0
    slow: str = "warning"  # what a slow device or link is: warning | error


@dataclass
class Report:
    """What was found."""

    hosts: list[str]
    findings: list[Finding]
    speeds: dict[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> list[str]:
        """The hosts without an error, in order."""
        bad = {finding.host for finding in self.findings if finding.severity == "error"}
        return [host for host in self.hosts if host not in bad]

    def as_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {"good": self.good, "findings": [asdict(f) for f in self.findings], "speeds": self.speeds}


def examine(hosts: Mapping[str, int], settings: Settings, progress: Callable[[str], None] | None = None) -> Report:
    """Look at all hosts; return what is wrong with them."""
    say = progress or (lambda text: None)
    findings: list[Finding] = []
    with _shared_file(settings.output_dir) as nonce:
        stamps, answers = _ask(hosts, settings, list(nonce), say)
        own = Own(platform.python_version(), probe.packages(), probe.code_digest(str(ROOT)), nonce)
    told: dict[str, dict[str, Any]] = {}
    for host, answer in answers.items():
        match = _ANSWER.search(answer.out)
        value = _parsed(match[1]) if match else None
        if answer.problem or value is None:
            said = answer.problem or f"answers {answer.out[:60]!r} instead of what it was asked"
            findings.append(Finding(host, "answer", "error", said))
            continue
        begin, end = stamps[host]
        value["skew_s"], value["skew_bound_s"] = value["time"] - (begin + end) / 2, (end - begin) / 2
        told[host] = value
    findings += judge(told, own, hosts, settings)
    report = Report(list(hosts), findings)
    if settings.measure and report.good:
        good = {host: hosts[host] for host in report.good}
        addresses = {host: told[host]["address"] for host in good}
        report.speeds, slow = measure.measure(good, addresses, settings.burn_s, settings.ssh_port, settings.slow, say)
        report.findings += slow
    return report


def _ask(
    hosts: Mapping[str, int], settings: Settings, shared: list[str], say: Callable[[str], None]
) -> tuple[dict[str, tuple[float, float]], dict[str, remote.Answer]]:
    folders = [os.path.abspath(settings.output_dir), "/tmp", "/dev/shm"]
    folders += [settings.cache_dir] if settings.cache_dir else []
    request = {
        "root": str(ROOT),
        "folders": folders,
        "shared": shared,
        "files": list(settings.files),
        "timeout_s": settings.timeout_s,
    }
    script = remote.script_with(Path(probe.__file__), json.dumps(request))
    begin, ends = time.time(), {}

    def done(answer: remote.Answer) -> None:
        ends[answer.host] = time.time()
        say(f"{len(ends)} of {len(hosts)} hosts have answered")

    argv = [sys.executable, "-I", "-"]
    answers = remote.on_hosts(list(hosts), argv, script, settings.timeout_s, settings.ssh_port, done)
    return {host: (begin, ends[host]) for host in hosts}, answers


@contextmanager
def _shared_file(folder: str) -> Iterator[dict[str, str]]:
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


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and value.keys() >= probe.ANSWERS else None
