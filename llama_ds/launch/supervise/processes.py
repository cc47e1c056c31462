"""The processes of a job on all its hosts: looked at and ended, over ssh, those of this job and no others."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ds.job.folder import VARIABLE
from llama_ds.launch import remote

TIMEOUT_S = 20.0
AGENT = Path(__file__).with_name("agent.py")


@dataclass(frozen=True)
class Host:
    """What a host said of the job's processes."""

    host: str
    problem: str | None  # why it said nothing
    answer: dict[str, Any]

    @property
    def clean(self) -> bool:
        """Whether nothing of the job is left there, for certain."""
        return self.problem is None and not self.answer.get("left") and not self.answer.get("processes")


def kill(hosts: Sequence[str], folder: str, port: int | None = None) -> dict[str, Host]:
    """End all processes of the job whose folder this is, or of one attempt, on `hosts`."""
    return _ask(hosts, "kill", folder, port)


def look(hosts: Sequence[str], folder: str, stacks: bool = False, port: int | None = None) -> dict[str, Host]:
    """Say which processes of the job there are; with `stacks` ranks write where they are to the job's folder."""
    return _ask(hosts, "stacks" if stacks else "look", folder, port)


def _ask(hosts: Sequence[str], what: str, folder: str, port: int | None) -> dict[str, Host]:
    request = json.dumps({"do": what, "variable": VARIABLE, "folder": folder})
    answers = remote.on_hosts(hosts, [sys.executable, "-I", "-"], remote.script_with(AGENT, request), TIMEOUT_S, port)
    return {host: _read(answer) for host, answer in answers.items()}


def _read(answer: remote.HostAnswer) -> Host:
    if answer.problem:
        return Host(answer.host, answer.problem, {})
    try:
        value = json.loads(answer.out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return Host(answer.host, f"answers {answer.out[:80]!r} instead of JSON", {})
    return Host(answer.host, None, value) if isinstance(value, dict) else Host(answer.host, "answers no object", {})
