"""How fast hosts are beside each other: matrix products on every device, all-reduces within hosts and between pairs.

A device is slow when it is below 90 percent of the median of all and below it by five standard deviations, estimated
from the median absolute deviation: the first keeps the spread of healthy devices quiet, the second a noisy machine. A
host's link is judged by the better of its two pairings, with the host before it and the one after it: a slow partner
makes one slow, a slow host both. It is slow below 70 percent of the median.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_ds.launch import remote
from llama_ds.launch.preflight.checks import Finding
from llama_ds.launch.spread import median_and_deviation

ROOT = Path(__file__).resolve().parents[3]
DEVICE_SHARE, LINK_SHARE, SIGMAS = 0.9, 0.7, 5.0
START_S = 90.0  # for torch to be loaded and for the groups to come together
_ANSWER = re.compile(r"<burn>(.*)</burn>", re.DOTALL)


def measure(
    hosts: Mapping[str, int],
    addresses: Mapping[str, str],
    burn_s: float,
    ssh_port: int | None,
    severity: str,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[Finding]]:
    """Return the speeds of all hosts, and what is slow among them; `severity` is what slow is."""
    say(f"measuring {len(hosts)} hosts for about {burn_s + 10:.0f} s")
    plans = plan(hosts, addresses, random.randrange(20000, 30000))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from llama_ds.parallel.burn import main; main()"
    argv = {
        host: [sys.executable, "-c", code, json.dumps({"slots": hosts[host], "burn_s": burn_s, "groups": plans[host]})]
        for host in hosts
    }
    answers = remote.on_hosts(list(hosts), argv, b"", START_S + burn_s, ssh_port)
    slots: dict[str, list[dict[str, Any]]] = {}
    findings = []
    for host, answer in answers.items():
        match = _ANSWER.search(answer.out)
        found = json.loads(match[1]) if match else []
        if answer.problem or not found or None in found:
            findings.append(Finding(host, "measurement", "error", answer.problem or "a slot's process ended early"))
            continue
        slots[host] = found
        findings += [Finding(host, "all-reduce", "error", one["problem"]) for one in found[:1] if one.get("problem")]
    return slots, findings + slow(slots, severity)


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
            add("within", [host], port)
    for i in range(0, len(names) - 1, 2):
        add("pair", names[i : i + 2], port + 1)
    shifted = names[1:] + names[:1]
    if len(names) > 2:
        for i in range(0, len(names) - 1, 2):
            add("other pair", shifted[i : i + 2], port + 2)
    return groups


def slow(slots: Mapping[str, Sequence[Mapping[str, Any]]], severity: str) -> list[Finding]:
    """Return which devices and links are slow among those of all hosts."""
    findings = []
    devices = {(host, i): float(one["tflops"]) for host, found in slots.items() for i, one in enumerate(found)}
    middle, least = _bounds(list(devices.values()), DEVICE_SHARE)
    for (host, slot), value in devices.items():
        if value < least:
            text = f"device {slot} multiplies at {value:.3g} TFLOP/s, the median is {middle:.3g}"
            findings.append(Finding(host, "slow device", severity, text))
    links = {host: max((_link(one) for one in found), default=0.0) for host, found in slots.items()}
    links = {host: value for host, value in links.items() if value > 0}
    middle = statistics.median(links.values()) if len(links) > 2 else 0.0
    for host, value in links.items():
        if value < LINK_SHARE * middle:
            text = f"all-reduces with either neighbour at {value:.3g} GB/s, the median is {middle:.3g}"
            findings.append(Finding(host, "slow link", severity, text))
    return findings


def _link(one: Mapping[str, Any]) -> float:
    return max(one["groups"].get("pair") or 0.0, one["groups"].get("other pair") or 0.0)


def _bounds(values: list[float], share: float) -> tuple[float, float]:
    if len(values) < 3:  # of two, neither can be said to be the odd one
        return 0.0, 0.0
    middle, deviation = median_and_deviation(values)
    return middle, min(share * middle, middle - SIGMAS * deviation)
