"""The processes of a job on all its hosts: listed and killed over ssh, without touching other jobs."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llama_ds.job.folder import VARIABLE
from llama_ds.launch import remote

TIMEOUT_S = 20.0
AGENT = Path(__file__).with_name("agent.py")


@dataclass(frozen=True)
class HostProcesses:
    """A host's answer about the job's processes."""

    host: str
    problem: str | None  # reason of a missing answer
    answer: dict[str, Any]

    @property
    def clean(self) -> bool:
        """Whether certainly no process of the job is left on the host."""
        return self.problem is None and not self.answer.get("left") and not self.answer.get("processes")


class HostCheck:
    """A look at a host's processes in a background thread; `found` is None while it is in flight."""

    def __init__(self, host: str, folder: str, ssh_port: int | None, stacks: bool = False) -> None:
        self.host = host
        self.found: HostProcesses | None = None

        def check() -> None:
            self.found = look([host], folder, stacks, ssh_port)[host]

        threading.Thread(target=check, daemon=True).start()


def kill(
    hosts: Sequence[str], folder: str, port: int | None = None, spare: Mapping[int, int] | None = None
) -> dict[str, HostProcesses]:
    """Kill all processes on `hosts` that belong to the job or attempt of this folder, but the ranks in `spare`.

    `spare` has their process ids by rank.
    """
    return _ask(hosts, "kill", folder, port, spare or {})


def look(hosts: Sequence[str], folder: str, stacks: bool = False, port: int | None = None) -> dict[str, HostProcesses]:
    """Return the processes of the job; with `stacks`, ranks also dump their stacks to the job's folder."""
    return _ask(hosts, "stacks" if stacks else "look", folder, port)


def _ask(
    hosts: Sequence[str], what: str, folder: str, port: int | None, spare: Mapping[int, int] = MappingProxyType({})
) -> dict[str, HostProcesses]:
    request = json.dumps({"do": what, "variable": VARIABLE, "folder": folder, "spare": dict(spare)})
    answers = remote.on_hosts(hosts, [sys.executable, "-I", "-"], remote.script_with(AGENT, request), TIMEOUT_S, port)
    return {host: _read(answer) for host, answer in answers.items()}


def _read(answer: remote.HostAnswer) -> HostProcesses:
    if answer.problem:
        return HostProcesses(answer.host, answer.problem, {})
    try:
        value = json.loads(answer.out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        value = None
    if not isinstance(value, dict):
        return HostProcesses(answer.host, f"answers {answer.out[:80]!r} instead of a JSON object", {})
    return HostProcesses(answer.host, None, value)
