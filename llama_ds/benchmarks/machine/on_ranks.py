"""Runs a measurement on all ranks of a hostfile at once and returns the results of rank 0."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ds.errors import UserError
from llama_ds.launch.command import exported_to_ranks
from llama_ds.launch.hostfile import parse_hostfile
from llama_ds.launch.run_ranks import run_ranks


@dataclass(frozen=True)
class Cluster:
    """The ranks that measure, their launcher, and the file that describes their machine."""

    file: Path
    hostfile: str
    launcher: str
    nic: str
    ssh_port: int | None

    @property
    def hosts(self) -> dict[str, int]:
        """The slots of each host."""
        return parse_hostfile(self.hostfile)

    @property
    def slots(self) -> int:
        """The slots of every host.

        Raises:
            UserError: they differ.
        """
        slots = set(self.hosts.values())
        if len(slots) != 1:
            raise UserError(
                f"{self.hostfile}: hosts have {sorted(slots)} slots, but the planner assumes identical nodes; make "
                "them equal"
            )
        return slots.pop()


def measure(cluster: Cluster, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run the measurement on all ranks; return what rank 0 wrote.

    The scratch folder is next to the cluster's file, because all hosts must see it.

    Raises:
        UserError: a rank failed.
    """
    shared = cluster.file.resolve().parent
    shared.mkdir(parents=True, exist_ok=True)
    exports = exported_to_ranks(os.environ)
    exports.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // cluster.slots)))
    with tempfile.TemporaryDirectory(prefix="measure-", dir=shared) as folder:
        out = Path(folder, "found.json")
        text = json.dumps({**request, "out": str(out), "slots": cluster.slots, "nic": cluster.nic})
        settings: dict[str, Any] = {"launcher": cluster.launcher, "nic": cluster.nic, "ssh_port": cluster.ssh_port}
        script = str(Path(__file__).with_name("rank.py"))
        code = run_ranks(script, [text], cluster.hosts, Path(folder), exports=exports, **settings)
        if code or not out.exists():
            raise UserError(f"{cluster.hostfile}: a rank failed with exit code {code}; see its own message above")
        return json.loads(out.read_text())
