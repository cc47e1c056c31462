"""Placement of ranks on hosts, and checks that groups of ranks suit the network.

Tensor parallelism exchanges activations four times per layer and must stay within a host. A pipeline stage sends to the
next stage once per micro-batch; the network sustains this if each host exchanges messages with one previous and one
next host. Gradients are reduced once per step, over all hosts of a data-parallel group.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llama_ds.config.numbers import divisors
from llama_ds.errors import UserError, listed
from llama_ds.layout.axes import Axes, Coords


@dataclass(frozen=True)
class PlacedRank:
    """A rank with its host, its slot on the host, and its coordinates."""

    rank: int
    host: str
    slot: int  # local rank
    coords: Coords

    def as_data(self) -> dict[str, str | int]:
        """Return the rank as plain data with its coordinates by axis name."""
        return {"rank": self.rank, "host": self.host, "slot": self.slot, **self.coords.named}


@dataclass(frozen=True)
class PlacementFinding:
    """One result of the placement check, in one line."""

    severity: Literal["error", "warning", "ok"]
    text: str


def place_ranks(hosts: Mapping[str, int], axes: Axes, source: str = "hosts") -> list[PlacedRank]:
    """Assign ranks to the slots of `hosts` in order.

    Args:
        hosts: number of slots by host.
        axes: sizes of a replica's axes; dp is derived from the number of slots.
        source: file or option that lists the hosts, for error messages.

    Raises:
        UserError: The number of slots is not a multiple of the replica size.
    """
    replica = axes.replica_sizes
    for name, size in replica.items():
        if size < 1:
            raise UserError(f"{name} {size} is not a parallel size; use 1 or more")
    world, ranks = sum(hosts.values()), math.prod(replica.values())
    if world == 0 or world % ranks:
        fits = [n for n in (world // ranks * ranks, (world // ranks + 1) * ranks) if n]
        product = " * ".join(f"{name} {size}" for name, size in replica.items())
        raise UserError(
            f"{source}: {world} slots are not a multiple of {product} = {ranks}; "
            f"use {listed(fits)} slots, or change {listed(replica)}"
        )
    job_axes = replace(axes, dp=world // ranks)
    slots = [(host, slot) for host, count in hosts.items() for slot in range(count)]
    return [PlacedRank(n, host, slot, job_axes.coords(n)) for n, (host, slot) in enumerate(slots)]


def sizes(ranks: Sequence[PlacedRank]) -> Axes:
    """Return the sizes of the axes, given all ranks of a job."""
    return Axes(*(at + 1 for at in ranks[-1].coords))


def by_host(ranks: Iterable[PlacedRank]) -> dict[str, list[PlacedRank]]:
    """Return the ranks of each host."""
    found: dict[str, list[PlacedRank]] = defaultdict(list)
    for rank in ranks:
        found[rank.host].append(rank)
    return dict(found)


def findings(ranks: Sequence[PlacedRank], neighbours: int = 1) -> list[PlacementFinding]:
    """Check the placement of all ranks of a job: hosts, tensor, pipeline and data parallelism.

    Args:
        neighbours: data-parallel ranks that add gradients before others get them, `parallel.gradient_neighbours`.
    """
    slots = {host: len(found) for host, found in by_host(ranks).items()}
    context = [_context(ranks)] if sizes(ranks).cp > 1 else []
    near = [_neighbours(ranks, neighbours)] if neighbours > 1 else []
    return [_slots(slots, sizes(ranks)), _tensor(ranks, slots), *context, _pipeline(ranks, slots), _data(ranks), *near]


def _slots(slots: Mapping[str, int], axes: Axes) -> PlacementFinding:
    job = f"{_count(sum(slots.values()), 'rank')} = {axes.words(' * ')}"
    counts = Counter(slots.values())
    if len(counts) == 1:
        return PlacementFinding(
            "ok", f"hosts: {_count(len(slots), 'host')} of {_count(next(iter(counts)), 'slot')}, {job}"
        )
    kinds = []
    for size, hosts in sorted(counts.items(), reverse=True):
        names = _some([host for host, count in slots.items() if count == size])
        kinds.append(f"{_count(hosts, 'host')} of {_count(size, 'slot')} ({names})")
    return PlacementFinding(
        "warning", f"hosts: slots differ: {', '.join(kinds)}; {job}; use as many of every host, or leave hosts out"
    )


def _tensor(ranks: Sequence[PlacedRank], slots: Mapping[str, int]) -> PlacementFinding:
    axes = sizes(ranks)
    tp = axes.tp
    if tp == 1:
        return PlacementFinding("ok", "tp: 1, nothing to exchange within a layer")
    groups = [[ranks[rank] for rank in group] for group in axes.groups("tp")]
    spanning = [group for group in groups if group[0].host != group[-1].host]
    if not spanning:
        return PlacementFinding("ok", f"tp: {_groups_text(len(groups))} of {tp} ranks within a host")
    first = spanning[0]
    return PlacementFinding(
        "error",
        f"tp: {len(spanning)} of {len(groups)} groups of {tp} ranks span hosts, first ranks "
        f"{first[0].rank}-{first[-1].rank} on {_some(_distinct(r.host for r in first))}; use a tp that divides "
        f"every host's slots: {listed(divisors(math.gcd(*slots.values())))}",
    )


def _context(ranks: Sequence[PlacedRank]) -> PlacementFinding:
    axes = sizes(ranks)
    groups = axes.groups("cp")
    spanning = [group for group in groups if len({ranks[rank].host for rank in group}) > 1]
    if not spanning:
        return PlacementFinding("ok", f"cp: {_groups_text(len(groups))} of {axes.cp} ranks within a host")
    return PlacementFinding(
        "ok",
        f"cp: {len(spanning)} of {len(groups)} groups of {axes.cp} ranks span hosts, the first "
        f"{_some(_distinct(ranks[rank].host for rank in spanning[0]))}; all keys and values pass between them",
    )


def _pipeline(ranks: Sequence[PlacedRank], slots: Mapping[str, int]) -> PlacementFinding:
    axes = sizes(ranks)
    if axes.pp == 1:
        return PlacementFinding("ok", "pp: 1, no stage sends to another")
    stage = axes.stride("pp")
    links = list(zip(ranks, ranks[stage:], strict=False))
    after, before = defaultdict(set), defaultdict(set)  # hosts that hold neighbours of a host's ranks
    within = 0
    for here, there in links:
        if here.host == there.host:
            within += 1
        else:
            after[here.host].add(there.host)
            before[there.host].add(here.host)
    text = f"pp: of {_count(len(links), 'stage-to-stage link')} {within} within a host, {len(links) - within} between"
    far = {host: max(after[host], before[host], key=len) for host in slots}
    scattered = {host: others for host, others in far.items() if len(others) > 1}
    if not scattered:
        way = "" if within == len(links) else ", those of a host to one next and from one previous host"
        return PlacementFinding("ok", text + way)
    host = next(iter(scattered))
    way = "to" if len(after[host]) > 1 else "from"
    others = _some([other for other in slots if other in scattered[host]])
    fix = (
        f"a stage's {stage} ranks do not fill hosts of {slots[host]}; use a pp that divides {len(slots)} hosts"
        if len(set(slots.values())) == 1
        else "the hosts' slots differ; use as many of every host, or have each stage begin with a host of its own"
    )
    return PlacementFinding(
        "warning", f"{text}, those of {_count(len(scattered), 'host')} scattered, first {host}'s {way} {others}; {fix}"
    )


def _data(ranks: Sequence[PlacedRank]) -> PlacementFinding:
    axes = sizes(ranks)
    dp, name = axes.data_axis, "dp * cp" if axes.cp > 1 else "dp"
    if dp == 1:
        return PlacementFinding("ok", "dp: 1, no gradients to reduce between ranks")
    groups: dict[Coords, Counter[str]] = defaultdict(Counter)
    for rank in ranks:
        groups[rank.coords._replace(dp=0, cp=0)][rank.host] += 1
    spanning = [group for group in groups.values() if len(group) > 1]
    groups_text = _groups_text(len(groups))
    if not spanning:
        return PlacementFinding("ok", f"{name}: {groups_text} of {dp} ranks within a host, gradients reduced there")
    hosts = _from_to({len(group) for group in groups.values()})
    each = _from_to({count for group in groups.values() for count in group.values()})
    shared = max(Counter(host for group in spanning for host in group).values())
    return PlacementFinding(
        "ok",
        f"{name}: {groups_text} of {dp} ranks over {hosts} hosts, {each} on a host; "
        f"{_count(shared, 'group')} at most {'reduce' if shared > 1 else 'reduces'} gradients through a host's network",
    )


def _neighbours(ranks: Sequence[PlacedRank], neighbours: int) -> PlacementFinding:
    hosts = [[ranks[rank].host for rank in group] for group in sizes(ranks).groups("dp", "cp")]
    groups = [group[at : at + neighbours] for group in hosts for at in range(0, len(group), neighbours)]
    spanning = [group for group in groups if len(set(group)) > 1]
    name = "gradient_neighbours"
    if not spanning:
        return PlacementFinding("ok", f"{name}: {_groups_text(len(groups))} of {neighbours} ranks within a host")
    together = math.gcd(*(count for group in hosts for count in Counter(group).values()))
    return PlacementFinding(
        "warning",
        f"{name}: {len(spanning)} of {len(groups)} groups of {neighbours} ranks span hosts, the first "
        f"{_some(_distinct(spanning[0]))}, between which gradients then pass in fp32; use "
        f"parallel.gradient_neighbours = {listed(divisors(together))}",
    )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _groups_text(groups: int) -> str:
    return "the group" if groups == 1 else f"all {groups} groups"


def _from_to(numbers: Collection[int]) -> str:
    return str(min(numbers)) if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def _distinct(hosts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(hosts))


def _some(hosts: Sequence[str]) -> str:
    """Return the names as text, abbreviated if there are more than three."""
    return " and ".join(hosts) if len(hosts) < 4 else f"{hosts[0]}, {hosts[1]} and {len(hosts) - 2} more"
