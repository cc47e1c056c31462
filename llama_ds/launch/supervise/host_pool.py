"""Choice of the next attempt's hosts: the same, spares instead of bad ones, or fewer with the same global batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.launch.preflight import promote
from llama_ds.layout.layout import Layout, model_axes, resolve_layout

STRIKES = 2  # a host that caused so many failures is excluded as long as others are available


@dataclass
class HostPool:
    """The hosts of a job: those of its hostfile, its spares, and their numbers of failures."""

    run: RunConfig
    hosts: dict[str, int]  # slots by host, as in the hostfile
    spares: dict[str, int] = field(default_factory=dict)
    strikes: dict[str, int] = field(default_factory=dict)  # failures by host

    @property
    def all_hosts(self) -> dict[str, int]:
        """All hosts, spares last."""
        return self.hosts | self.spares

    def replace(self, hosts: Mapping[str, int], spares: Mapping[str, int]) -> str:
        """Take the hosts of changed files; return what has changed, in words, "" if nothing has."""
        before, self.hosts, self.spares = self.all_hosts, dict(hosts), dict(spares)
        new = [host for host, slots in self.all_hosts.items() if before.get(host) != slots]
        gone = [host for host in before if host not in self.all_hosts]
        parts = [f"{what} {', '.join(names)}" for what, names in (("with", new), ("without", gone)) if names]
        return " and ".join(parts)

    def blame(self, hosts: list[str], strikes: int = 1) -> None:
        """Count a failure of hosts; `STRIKES` strikes exclude them at once."""
        for host in hosts:
            self.strikes[host] = self.strikes.get(host, 0) + strikes

    def choose(self, good: list[str]) -> dict[str, int]:
        """Return the hosts of the next attempt with their slots, chosen among the hosts that are `good`.

        Each host keeps its line in the hostfile; the first spare with enough slots takes the line of a bad host.

        Raises:
            UserError: the remaining hosts are too few for any layout of the run.
        """
        struck = {host for host in good if self.strikes.get(host, 0) >= STRIKES}
        # Hosts that were added to the hostfile during the job, and that no layout of the run can use, are spares too.
        lines = first_slots(self.hosts, largest_world(self.run, sum(self.hosts.values())) or 0)
        others = {host: slots for host, slots in self.all_hosts.items() if host not in lines}
        for excluded in (struck, set()):  # a host that failed twice is better than none
            usable = [host for host in good if host not in excluded]
            chosen = promote(lines, usable, others)
            if chosen:
                return chosen
        world = largest_world(self.run, sum(self.all_hosts[host] for host in good))
        if world is None:
            axes = model_axes(self.run.parallel)
            raise UserError(
                f"{len(good)} good hosts with {sum(self.all_hosts[host] for host in good)} slots are left, too few for "
                f"any layout of {self.run.path} (pp * cp * tp = {axes.replica}, and dp must divide its batches); add "
                "spares"
            )
        ordered = [host for host in good if host not in struck] + [host for host in good if host in struck]
        return first_slots({host: self.all_hosts[host] for host in ordered}, world)


def largest_world(run: RunConfig, slots: int) -> int | None:
    """Return the largest world size up to `slots` on which a run keeps its global batch, None if there is none."""
    unit = model_axes(run.parallel).replica
    return next((world for world in range(slots - slots % unit, 0, -unit) if valid_layout(run, world)), None)


def valid_layout(run: RunConfig, world: int) -> Layout | None:
    """Return the layout of a run for a world size, None if its batches are not divisible by it."""
    try:
        layout = resolve_layout(run, world)
    except UserError:
        return None
    return None if run.evaluation.rows % (layout.dp * layout.micro_batch) else layout


def first_slots(hosts: Mapping[str, int], world: int) -> dict[str, int]:
    """Return the first hosts with `world` slots in total."""
    chosen: dict[str, int] = {}
    for host, slots in hosts.items():
        take = min(slots, world - sum(chosen.values()))
        if take:
            chosen[host] = take
    return chosen
