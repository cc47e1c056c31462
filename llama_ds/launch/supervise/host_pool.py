"""Which hosts the next attempt runs on: the same, spares in the places of bad ones, or fewer with the same batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.launch.preflight import promote
from llama_ds.layout.layout import Layout, model_axes, resolve_layout

STRIKES = 2  # failures because of a host after which it is left out, as long as others are there


@dataclass
class HostPool:
    """The hosts of a job: those of its hostfile, its spares, and what is held against them."""

    run: RunConfig
    hosts: dict[str, int]  # slots, as the hostfile gives them
    spares: dict[str, int] = field(default_factory=dict)
    strikes: dict[str, int] = field(default_factory=dict)

    @property
    def every(self) -> dict[str, int]:
        """All hosts that there are, spares last."""
        return self.hosts | self.spares

    @property
    def world(self) -> int:
        """The number of ranks that the run is meant to have."""
        return sum(self.hosts.values())

    def blame(self, hosts: list[str]) -> None:
        """Hold a failure against hosts."""
        for host in hosts:
            self.strikes[host] = self.strikes.get(host, 0) + 1

    def choose(self, good: list[str]) -> dict[str, int]:
        """Return the hosts of the next attempt, slots of each, of those that are `good`.

        A place in the hostfile stays its host's; a bad host's place is taken by the first spare with as many slots.

        Raises:
            UserError: too few are left for any layout of the run.
        """
        struck = {host for host in good if self.strikes.get(host, 0) >= STRIKES}
        for out in (struck, set()):  # a host that has failed twice is better than none
            usable = [host for host in good if host not in out]
            chosen = promote(self.hosts, usable, self.spares)
            if chosen:
                return chosen
        world = largest_world(self.run, sum(self.every[host] for host in good))
        if world is None:
            axes = model_axes(self.run.parallel)
            raise UserError(
                f"{len(good)} good hosts with {sum(self.every[host] for host in good)} slots are left, too few for any "
                f"layout of {self.run.path} (pp * tp = {axes.replica}, and dp must divide its batches); add spares"
            )
        ordered = [host for host in good if host not in struck] + [host for host in good if host in struck]
        return first_slots({host: self.every[host] for host in ordered}, world)


def largest_world(run: RunConfig, slots: int) -> int | None:
    """Return the most ranks, up to `slots`, on which a run can keep its global batch; None when there are none."""
    unit = model_axes(run.parallel).replica
    return next((world for world in range(slots - slots % unit, 0, -unit) if legal(run, world)), None)


def legal(run: RunConfig, world: int) -> Layout | None:
    """Return the layout of a run on so many ranks, None when its batches do not divide."""
    try:
        layout = resolve_layout(run, world)
    except UserError:
        return None
    return None if run.evaluation.rows % (layout.dp * layout.micro_batch) else layout


def first_slots(hosts: Mapping[str, int], world: int) -> dict[str, int]:
    """Return the first hosts with `world` slots in all."""
    chosen: dict[str, int] = {}
    for host, slots in hosts.items():
        take = min(slots, world - sum(chosen.values()))
        if take:
            chosen[host] = take
    return chosen
