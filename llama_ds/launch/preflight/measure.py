"""How fast hosts are beside each other: matrix products on every device, all-reduces within hosts and between pairs.

A device is slow when it is below 90 percent of the median of all and below it by five standard deviations, estimated
from the median absolute deviation: the first keeps the spread of healthy devices quiet, the second a noisy machine. As
long as fewer than half are slow, they do not move that measure much; where half are, nobody can say which half, and
nothing is said. Of two neither is slow: both are as far from the median.

A host's link is judged by the better of its two pairings, with the host before it and the one after it: a slow partner
makes one slow, a slow host both. It is slow below 70 percent of the median of all hosts, of which there must be three.
In the same way an all-reduce that fails is held against a host only when none of its pairings succeeded.

Whoever would be named is measured a second time first, beside the fastest of the others and without the rest: a sound
host between two bad ones, or one that something else kept busy, is not named.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from llama_ds.job.robust_stats import median_and_deviation
from llama_ds.launch import remote
from llama_ds.launch.preflight import answer
from llama_ds.launch.preflight.checks import HostFinding

ROOT = Path(__file__).resolve().parents[3]
DEVICE_SHARE, LINK_SHARE, SIGMAS = 0.9, 0.7, 5.0
START_S = 90.0  # for torch to be loaded and for the groups to come together
TOGETHER_S = 0.25  # between bunches of hosts that are started: pairs wait for each other
WITHIN, PAIRINGS = "within", ("pair", "other pair", "last pair")


def measure(
    hosts: Mapping[str, int],
    addresses: Mapping[str, str],
    burn_s: float,
    ssh_port: int | None,
    severity: str,
    say: Callable[[str], None],
) -> tuple[dict[str, list[dict[str, Any]]], list[HostFinding]]:
    """Return the speeds of all hosts, and what is slow among them; `severity` is what slow is."""
    say(f"measuring {len(hosts)} hosts for about {burn_s + 10:.0f} s")
    slots, problems = _look(hosts, addresses, burn_s, ssh_port)
    found = failed(slots) + slow(slots, severity)
    accused = {finding.host for finding in found}
    if order := second_look(slots, accused):
        say(f"measuring again beside others, before they are named: {', '.join(order[::2])}")
        better(slots, _look({host: hosts[host] for host in order}, addresses, burn_s, ssh_port)[0], accused)
        found = [finding for finding in failed(slots) + slow(slots, severity) if finding.host in accused]
    return slots, problems + found


def _look(
    hosts: Mapping[str, int], addresses: Mapping[str, str], burn_s: float, ssh_port: int | None
) -> tuple[dict[str, list[dict[str, Any]]], list[HostFinding]]:
    """Return what hosts measure that are paired in this order, and those that do not end well."""
    plans = plan(hosts, addresses, random.randrange(20000, 30000))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from llama_ds.parallel.burn import main; main()"
    argv = {
        host: [sys.executable, "-c", code, json.dumps({"slots": hosts[host], "burn_s": burn_s, "groups": plans[host]})]
        for host in hosts
    }
    answers = remote.on_hosts(list(hosts), argv, b"", START_S + burn_s, ssh_port, hold_s=TOGETHER_S)
    slots: dict[str, list[dict[str, Any]]] = {}
    findings = []
    for host, said in answers.items():
        found = answer.read(said.out, "burn", answer.SPEEDS)
        if said.problem or not found:
            problem = said.problem or "a slot's process ended early"
            findings.append(HostFinding(host, "measurement", "error", f"{problem}; run it there to see why"))
            continue
        slots[host] = found
    return slots, findings


def second_look(slots: Mapping[str, Sequence[Mapping[str, Any]]], accused: Set[str]) -> list[str]:
    """Return an order of hosts: at every second place one that is accused, between them the fastest others."""
    others = sorted((host for host in slots if host not in accused), key=lambda host: -link(slots[host]))
    pairs = zip([host for host in slots if host in accused], others, strict=False)
    return [host for pair in pairs for host in pair]


def better(
    slots: Mapping[str, Sequence[dict[str, Any]]],
    again: Mapping[str, Sequence[Mapping[str, Any]]],
    accused: Set[str],
) -> None:
    """Give those accused the better of two looks; what fails within a host is its own, and stays."""
    for host in accused & again.keys():
        for first, second in zip(slots[host], again[host], strict=False):
            first["tflops"] = max(first["tflops"], second["tflops"])
            for name in PAIRINGS:
                speeds = [one["groups"][name] for one in (first, second) if one["groups"].get(name) is not None]
                if speeds:
                    first["groups"][name] = max(speeds)


def plan(hosts: Mapping[str, int], addresses: Mapping[str, str], port: int) -> dict[str, list[dict[str, Any]]]:
    """Return the groups of each host's slots, in the order in which they come together."""
    names = list(hosts)
    groups: dict[str, list[dict[str, Any]]] = {host: [] for host in names}

    def add(name: str, members: Sequence[str], port: int) -> None:
        size, first = sum(hosts[host] for host in members), 0
        for host in members:
            one = {"name": name, "master": addresses[members[0]], "port": port, "first": first, "size": size}
            groups[host].append(one)
            first += hosts[host]

    for host in names:
        if hosts[host] > 1:
            add(WITHIN, [host], port)
    rounds = [names, names[1:] + names[:1], [names[-1], names[0]]]
    rounds = rounds[: 1 if len(names) < 3 else 2 + len(names) % 2]  # of an odd number one host is left out of each
    for number, (name, order) in enumerate(zip(PAIRINGS, rounds, strict=False), 1):
        for i in range(0, len(order) - 1, 2):
            add(name, order[i : i + 2], port + number)
    return groups


def failed(slots: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[HostFinding]:
    """Return the hosts whose all-reduces failed, within them or with whomever they were paired."""
    findings = []
    for host, found in slots.items():
        within = [one["groups"][WITHIN] for one in found if WITHIN in one["groups"]]
        paired = [one["groups"][name] for one in found for name in PAIRINGS if name in one["groups"]]
        if None in within or (paired and set(paired) == {None}):
            said = next((str(one["problem"]) for one in found if one.get("problem")), "no answer")
            fix = "look at its network, and at what stands between it and the others"
            findings.append(HostFinding(host, "all-reduce", "error", f"{said}; {fix}"))
    return findings


def slow(slots: Mapping[str, Sequence[Mapping[str, Any]]], severity: str) -> list[HostFinding]:
    """Return which devices and links are slow among those of all hosts."""
    findings = []
    devices = {(host, slot): float(one["tflops"]) for host, found in slots.items() for slot, one in enumerate(found)}
    middle, least = bounds(list(devices.values()))
    for (host, slot), value in devices.items():
        if not value >= least:
            text = f"device {slot} multiplies at {value:.3g} TFLOP/s, the median is {middle:.3g}"
            text += f", {least:.3g} are wanted; look at its temperature, its clocks and what else runs there"
            findings.append(HostFinding(host, "slow device", severity, text))
    links = {host: link(found) for host, found in slots.items()}
    links = {host: value for host, value in links.items() if value > 0}
    middle = statistics.median(links.values()) if len(links) > 2 else 0.0
    for host, value in links.items():
        if value < LINK_SHARE * middle:
            text = f"all-reduces with either neighbour at {value:.3g} GB/s, the median is {middle:.3g}"
            text += f", {LINK_SHARE * middle:.3g} are wanted; look at its cable, its port and its NIC"
            findings.append(HostFinding(host, "slow link", severity, text))
    return findings


def link(found: Sequence[Mapping[str, Any]]) -> float:
    """Return the better of a host's pairings in GB/s, 0 where it has none."""
    return max((one["groups"].get(name) or 0.0 for one in found for name in PAIRINGS), default=0.0)


def bounds(speeds: Sequence[float]) -> tuple[float, float]:
    """Return the median of the devices' speeds, and the least that is not slow."""
    finite = [speed for speed in speeds if math.isfinite(speed)]
    if not finite:
        return 0.0, 0.0
    middle, deviation = median_and_deviation(finite)
    return middle, min(DEVICE_SHARE * middle, middle - SIGMAS * deviation)
