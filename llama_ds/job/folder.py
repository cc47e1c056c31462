"""A job's folder: all that the launcher, the ranks and a person look for, in one place that all hosts see.

runs/NAME/jobs/0001/events.jsonl        what happened, one event a line
runs/NAME/jobs/0001/attempt_01/         one start of the ranks:
    job.json hostfile arguments environment     what they were started with
    token                               the secret by which they know each other; only the owner may read it
    logs/launcher.log rank_00000.log    what DeepSpeed's launcher and every rank printed
    stacks/rank_00000.txt               where a hanging rank was
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ds.errors import UserError

MPI_LAUNCHERS = ("openmpi", "mpich", "impi")
VARIABLE = "LLAMA_DS_JOB"  # in every process of a job: the attempt's folder
CONNECT_S = 5.0  # that a rank tries to connect at a time
RETRY_S = 1.0  # between two tries


@dataclass(frozen=True)
class Job:
    """What a rank must know of the attempt that it is part of."""

    folder: str  # of the attempt
    hosts: dict[str, int]  # slots of each, in the order of the ranks
    launcher: str
    server: tuple[str, int]  # where the supervisor listens
    beat_s: float  # between two beats of a rank
    orphan_s: float  # after which a rank that has lost the supervisor ends
    nic: str = ""  # of the ranks' traffic; "": the one that leads to the first host

    @property
    def world(self) -> int:
        """The number of ranks."""
        return sum(self.hosts.values())

    @property
    def connect_s(self) -> float:
        """How long a rank tries to connect at a time; in between it looks at the clock."""
        return min(CONNECT_S, self.orphan_s / 3)

    @property
    def unheard_s(self) -> float:
        """How long what a rank sends may stay unacknowledged until it takes the supervisor for gone."""
        return max(self.orphan_s / 3, 2 * self.beat_s)

    @property
    def fence_s(self) -> float:
        """Within which a rank that the supervisor hears no more has ended itself, counted from the supervisor's end."""
        return self.beat_s + self.unheard_s + self.orphan_s + self.connect_s + RETRY_S

    def log(self, rank: int) -> Path:
        """Return the file of a rank's output."""
        return Path(self.folder, "logs", f"rank_{rank:05d}.log")

    @property
    def launcher_log(self) -> Path:
        """The file of the launcher's output."""
        return Path(self.folder, "logs", "launcher.log")

    def stacks(self, rank: int) -> Path:
        """Return the file into which a rank's fault handler writes."""
        return Path(self.folder, "stacks", f"rank_{rank:05d}.txt")

    def path(self, name: str) -> str:
        """Return the path of one of the attempt's files."""
        return os.path.join(self.folder, name)

    def token(self) -> bytes:
        """Return the attempt's secret."""
        return bytes.fromhex(Path(self.folder, "token").read_text())

    @property
    def places(self) -> list[str]:
        """The host of every rank."""
        return [host for host, slots in self.hosts.items() for _ in range(slots)]


def current(environment: Mapping[str, str]) -> Job | None:
    """Return the job that this process is part of, None where it was started otherwise.

    Raises:
        UserError: its folder cannot be read here.
    """
    folder = environment.get(VARIABLE)
    if not folder:
        return None
    try:
        with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
            values: dict[str, Any] = json.load(file)
        return Job(**values | {"server": tuple(values["server"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder}: the job's folder cannot be read on this host ({error}); "
            "set output_dir to a folder that all hosts share"
        ) from None
