"""Choice of the next attempt's hosts: the same, spares instead of bad ones, or fewer with the same global batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.launch.preflight import promote
from llama_ds.layout.layout import Layout, model_axes, resolve_layout

STRIKES = 1.5  # a host with so many strikes is excluded as long as others are available: two failures within a week
DRAINED = 4.0  # strikes of a host that is certain to have had wrong numbers: excluded for ten days
HALF_LIFE_D = 7.0  # days after which a strike counts half


@dataclass
class HostPool:
    """The hosts of a job: those of its hostfile, its spares, and their numbers of failures."""

    run: RunConfig
    hosts: dict[str, int]  # slots by host, as in the hostfile
    spares: dict[str, int] = field(default_factory=dict)
    now: Callable[[], float] = time.time
    _blamed: dict[str, tuple[float, float]] = field(default_factory=dict)  # strikes by host, and when they were counted
    _chosen: dict[str, int] = field(default_factory=dict)  # the hosts of the last attempt, {} before the first choice
    _recent: set[str] = field(default_factory=set)  # hosts that were blamed since that choice
    _drained: set[str] = field(default_factory=set)  # hosts that have had wrong numbers

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

    @property
    def strikes(self) -> dict[str, float]:
        """The failures of each host that had one; each counts half as much after `HALF_LIFE_D` days."""
        now = self.now()
        return {
            host: round(count * 0.5 ** ((now - at) / (86400 * HALF_LIFE_D)), 3)
            for host, (count, at) in self._blamed.items()
        }

    def blame(self, hosts: list[str], strikes: float = 1.0) -> None:
        """Count a failure of hosts; `DRAINED` strikes exclude them at once."""
        for host in hosts:
            self._blamed[host] = self.strikes.get(host, 0.0) + strikes, self.now()
        self._recent.update(hosts)
        if strikes >= DRAINED:
            self._drained.update(hosts)

    def choose(self, good: list[str]) -> dict[str, int]:
        """Return the hosts of the next attempt with their slots, chosen among the hosts that are `good`.

        The hosts of the last attempt keep their places, where the states of their ranks are in memory; the first other
        host with enough slots takes the place of a bad one. A host that was replaced and is good again is a spare.

        Raises:
            UserError: the remaining hosts are too few for any layout of the run.
        """
        good, strikes = [host for host in good if host in self.all_hosts], self.strikes
        worst = sorted((host for host in good if strikes.get(host, 0.0) >= STRIKES), key=lambda host: -strikes[host])
        # One that was taken all the same keeps its place until it fails again: it may hold the only copy of a state.
        # But one that has had wrong numbers is replaced: a state on disk is better than the next wrong number.
        again = self._recent | self._drained
        struck = [host for host in worst if host in again or host not in self._chosen]
        # Hosts that were added to the hostfile during the job, and that no layout of the run can use, are spares too.
        lines = first_slots(self.hosts, largest_world(self.run, sum(self.hosts.values())) or 0)
        if list(self._chosen.values()) == list(lines.values()):
            lines = self._chosen
        others = {host: slots for host, slots in self.all_hosts.items() if host not in lines}
        for excluded in range(len(struck), -1, -1):  # the worst; a host that failed twice is better than none
            usable = [host for host in good if host not in struck[:excluded]]
            chosen = promote(lines, usable, others)
            if chosen:
                self._chosen, self._recent = chosen, set()
                return chosen
        world = largest_world(self.run, sum(self.all_hosts[host] for host in good))
        if world is None:
            axes, neighbours = model_axes(self.run.parallel), self.run.parallel.gradient_neighbours
            groups = f", dp * cp be a multiple of parallel.gradient_neighbours = {neighbours}" if neighbours > 1 else ""
            raise UserError(
                f"{len(good)} good hosts with {sum(self.all_hosts[host] for host in good)} slots are left, too few for "
                f"any layout of {self.run.path} (pp * cp * tp = {axes.replica}, and dp must divide its batches{groups})"
                "; add spares"
            )
        ordered = [host for host in good if host not in struck] + struck[::-1]
        self._chosen, self._recent = first_slots({host: self.all_hosts[host] for host in ordered}, world), set()
        return self._chosen


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
