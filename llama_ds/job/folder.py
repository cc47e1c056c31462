"""A job's folder on the shared file system, used by the launcher, the ranks and people.

runs/NAME/jobs/0001/events.jsonl        the event log, one JSON object per line
runs/NAME/jobs/0001/attempt_01/         one start of the ranks:
    job.json hostfile arguments environment     inputs of the launch
    token                               the attempt's shared secret, readable only by its owner
    secrets                             variables for the ranks that no command may show, readable only by its owner
    logs/launcher.log rank_00000.log    output of DeepSpeed's launcher and of every rank
    stacks/rank_00000.txt               stack traces of a hanging rank
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_ds.errors import UserError

MPI_LAUNCHERS = ("openmpi", "mpich", "impi")
VARIABLE = "LLAMA_DS_JOB"  # environment variable of every process of a job: the attempt's folder
CONNECT_S = 5.0  # timeout of one connection attempt
RETRY_S = 1.0  # pause between two connection attempts


@dataclass(frozen=True)
class Job:
    """The attempt that a rank belongs to."""

    folder: str  # the attempt's folder
    hosts: dict[str, int]  # slots per host, in rank order
    launcher: str
    server: tuple[str, int]  # address and port on which the supervisor listens
    beat_s: float  # heartbeat interval
    orphan_s: float  # a rank without a supervisor terminates after this time
    nic: str = ""  # interface for the ranks' traffic; "": the interface that routes to the first host
    started: float = 0.0  # when the job began, in seconds since the epoch; 0: unknown
    accounts: dict[str, float] = field(default_factory=dict)  # metrics of the run's time until this attempt
    keeps_ranks: bool = False  # whether ranks without a fault go on in the next attempt

    @property
    def world(self) -> int:
        """The number of ranks."""
        return sum(self.hosts.values())

    @property
    def connect_s(self) -> float:
        """Timeout of one connection attempt; a rank checks its orphan deadline between two of them."""
        return min(CONNECT_S, self.orphan_s / 3)

    @property
    def unheard_s(self) -> float:
        """How long sent data may stay unacknowledged before a rank considers the supervisor unreachable."""
        return max(self.orphan_s / 3, 2 * self.beat_s)

    @property
    def fence_s(self) -> float:
        """Seconds after which an unreachable rank has certainly terminated itself, counted from the attempt's end."""
        return self.beat_s + self.unheard_s + self.orphan_s + self.connect_s + RETRY_S

    def log(self, rank: int) -> Path:
        """Return the path of a rank's log."""
        return Path(self.folder, "logs", f"rank_{rank:05d}.log")

    @property
    def launcher_log(self) -> Path:
        """The path of the launcher's log."""
        return Path(self.folder, "logs", "launcher.log")

    def stacks(self, rank: int) -> Path:
        """Return the file to which a rank's fault handler writes stack traces."""
        return Path(self.folder, "stacks", f"rank_{rank:05d}.txt")

    def path(self, name: str) -> str:
        """Return the path of one of the attempt's files."""
        return os.path.join(self.folder, name)

    def token(self) -> bytes:
        """Return the attempt's shared secret."""
        return bytes.fromhex(Path(self.folder, "token").read_text())

    def secrets(self) -> dict[str, str]:
        """Return the environment variables for the ranks that are secrets.

        Raises:
            UserError: the file cannot be read on this host.
        """
        try:
            found: dict[str, str] = json.loads(Path(self.folder, "secrets").read_text(encoding="utf-8"))
            return found
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.folder}/secrets: cannot be read on this host ({error}); start the job again"
            ) from None

    @property
    def rank_hosts(self) -> list[str]:
        """The host of every rank."""
        return [host for host, slots in self.hosts.items() for _ in range(slots)]


def current(environment: Mapping[str, str]) -> Job | None:
    """Return the job that this process belongs to, or None if tools/launch.py did not start it.

    Raises:
        UserError: the job's folder cannot be read on this host.
    """
    folder = environment.get(VARIABLE)
    if not folder:
        return None
    try:
        with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
            values: dict[str, Any] = json.load(file)
        return Job(**values | {"server": tuple(values["server"])})
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{folder}: the job's folder cannot be read on this host ({error}); "
            "set output_dir to a folder that all hosts share"
        ) from None
