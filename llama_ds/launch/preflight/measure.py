"""Relative speed of hosts: matrix products on every device, all-reduces within hosts and between pairs of hosts.

A device is slow if it is below 90 percent of the median and five standard deviations below the median, estimated from
the median absolute deviation. The first rule tolerates the spread of healthy devices, the second a noisy machine. If
fewer than half of the devices are slow, they hardly move these estimates. If half are slow, none is reported, since it
is unclear which half; of two devices none is slow, since both are equally far from the median.

A host's link is judged by the better of its two pairings, with the host before it and the host after it: a slow partner
slows one pairing, a slow host both. A link is slow below 70 percent of the median, if there are at least three hosts.
Likewise, a failed all-reduce counts against a host only if none of its pairings succeeded.

Suspect hosts are measured again before they are reported, each paired with one of the fastest other hosts: a healthy
host between two bad ones, or one that was busy for a moment, is not reported.
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
START_S = 90.0  # time to import torch and to form the process groups
STAGGER_S = 0.25  # delay between batches of started hosts; short, because paired hosts wait for each other
WITHIN, PAIRINGS = "within", ("pair", "other pair", "last pair")


def measure(
    hosts: Mapping[str, int],
    addresses: Mapping[str, str],
    burn_s: float,
    ssh_port: int | None,
    severity: str,
    print_line: Callable[[str], None],
) -> tuple[dict[str, list[dict[str, Any]]], list[HostFinding]]:
    """Return the speeds of all hosts, and findings; slow devices and links get `severity`."""
    print_line(f"measuring {len(hosts)} hosts for about {burn_s + 10:.0f} s")
    slots, problems = _look(hosts, addresses, burn_s, ssh_port)
    found = failed(slots) + slow(slots, severity)
    accused = {finding.host for finding in found}
    if order := second_look(slots, accused):
        print_line(f"measuring suspect hosts again, paired with fast hosts: {', '.join(order[::2])}")
        better(slots, _look({host: hosts[host] for host in order}, addresses, burn_s, ssh_port)[0], accused)
        found = [finding for finding in failed(slots) + slow(slots, severity) if finding.host in accused]
    return slots, problems + found


def _look(
    hosts: Mapping[str, int], addresses: Mapping[str, str], burn_s: float, ssh_port: int | None
) -> tuple[dict[str, list[dict[str, Any]]], list[HostFinding]]:
    """Return the measurements of hosts paired in this order, and findings for those that failed."""
    plans = plan(hosts, addresses, random.randrange(20000, 30000))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from llama_ds.launch.preflight.slots import main; main()"
    argv = {
        host: [sys.executable, "-c", code, json.dumps({"slots": hosts[host], "burn_s": burn_s, "groups": plans[host]})]
        for host in hosts
    }
    answers = remote.on_hosts(list(hosts), argv, b"", START_S + burn_s, ssh_port, hold_s=STAGGER_S)
    slots: dict[str, list[dict[str, Any]]] = {}
    findings = []
    for host, reply in answers.items():
        found = answer.read(reply.out, "burn", answer.SPEEDS)
        if reply.problem or not found:
            problem = reply.problem or "a slot's process ended early"
            findings.append(HostFinding(host, "measurement", "error", f"{problem}; run it there to see why"))
            continue
        slots[host] = found
    return slots, findings


def second_look(slots: Mapping[str, Sequence[Mapping[str, Any]]], accused: Set[str]) -> list[str]:
    """Return an order of hosts that alternates the accused with the fastest other hosts."""
    others = sorted((host for host in slots if host not in accused), key=lambda host: -link(slots[host]))
    pairs = zip([host for host in slots if host in accused], others, strict=False)
    return [host for pair in pairs for host in pair]


def better(
    slots: Mapping[str, Sequence[dict[str, Any]]],
    again: Mapping[str, Sequence[Mapping[str, Any]]],
    accused: Set[str],
) -> None:
    """Keep the better of two measurements for the accused; failures within a host stay."""
    for host in accused & again.keys():
        for first, second in zip(slots[host], again[host], strict=False):
            first["tflops"] = max(first["tflops"], second["tflops"])
            for name in PAIRINGS:
                speeds = [one["groups"][name] for one in (first, second) if one["groups"].get(name) is not None]
                if speeds:
                    first["groups"][name] = max(speeds)


def plan(hosts: Mapping[str, int], addresses: Mapping[str, str], port: int) -> dict[str, list[dict[str, Any]]]:
    """Return the process groups of each host's slots, in the order in which they are formed."""
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
    rounds = rounds[
        : 1 if len(names) < 3 else 2 + len(names) % 2
    ]  # with an odd number of hosts, each round leaves one out
    for number, (name, order) in enumerate(zip(PAIRINGS, rounds, strict=False), 1):
        for i in range(0, len(order) - 1, 2):
            add(name, order[i : i + 2], port + number)
    return groups


def failed(slots: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[HostFinding]:
    """Return the hosts whose all-reduces failed, within the host or in all of its pairings."""
    findings = []
    for host, found in slots.items():
        within = [one["groups"][WITHIN] for one in found if WITHIN in one["groups"]]
        paired = [one["groups"][name] for one in found for name in PAIRINGS if name in one["groups"]]
        if None in within or (paired and set(paired) == {None}):
            problem = next((str(one["problem"]) for one in found if one.get("problem")), "no answer")
            fix = "check its network and the path to the other hosts"
            findings.append(HostFinding(host, "all-reduce", "error", f"{problem}; {fix}"))
    return findings


def slow(slots: Mapping[str, Sequence[Mapping[str, Any]]], severity: str) -> list[HostFinding]:
    """Return the slow devices and links of all hosts."""
    findings = []
    devices = {(host, slot): float(one["tflops"]) for host, found in slots.items() for slot, one in enumerate(found)}
    median, minimum = bounds(list(devices.values()))
    for (host, slot), value in devices.items():
        if not value >= minimum:
            text = f"device {slot} multiplies at {value:.3g} TFLOP/s, the median is {median:.3g}"
            text += f", the minimum {minimum:.3g}; look at its temperature, its clocks and what else runs there"
            findings.append(HostFinding(host, "slow device", severity, text))
    links = {host: link(found) for host, found in slots.items()}
    links = {host: value for host, value in links.items() if value > 0}
    median = statistics.median(links.values()) if len(links) > 2 else 0.0
    for host, value in links.items():
        if value < LINK_SHARE * median:
            text = f"all-reduces with either neighbour at {value:.3g} GB/s, the median is {median:.3g}"
            text += f", the minimum {LINK_SHARE * median:.3g}; look at its cable, its port and its NIC"
            findings.append(HostFinding(host, "slow link", severity, text))
    return findings


def link(found: Sequence[Mapping[str, Any]]) -> float:
    """Return the speed of a host's better pairing in GB/s, 0 if it has none."""
    return max((one["groups"].get(name) or 0.0 for one in found for name in PAIRINGS), default=0.0)


def bounds(speeds: Sequence[float]) -> tuple[float, float]:
    """Return the median of the devices' speeds, and the lower bound for a healthy device."""
    finite = [speed for speed in speeds if math.isfinite(speed)]
    if not finite:
        return 0.0, 0.0
    median, deviation = median_and_deviation(finite)
    return median, min(DEVICE_SHARE * median, median - SIGMAS * deviation)
