"""From what hosts say of themselves to what is wrong with them: pure functions.

Code, Python, packages and clock are compared with those of the machine that launches, hardware with what most hosts
have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_ds.launch.preflight import devices
from llama_ds.launch.preflight.devices import Problem

GIB = 2**30
MAX_SKEW_S = 2.0  # logs and checkpoints of hosts are read together
SHM_GIB = 1.0  # NCCL's and the data's shared memory


@dataclass(frozen=True)
class HostFinding:
    """What is wrong with a host."""

    host: str
    check: str
    severity: str  # warning | error
    text: str


@dataclass(frozen=True)
class Own:
    """What the launching machine has, to compare with."""

    python: str
    packages: Mapping[str, str]
    code: str
    nonce: Mapping[str, str]  # what stands in the files that must be shared


def judge(
    answers: Mapping[str, Mapping[str, Any]], own: Own, slots: Mapping[str, int], settings: Any
) -> list[HostFinding]:
    """Return what is wrong with each host that has answered."""
    found = unlike(answers)
    for host, answer in answers.items():
        problems = [
            *_software(answer, own),
            *_disks(answer, own, settings.min_free_gib),
            *devices.problems(answer["gpus"], answer["xids"], slots[host]),
            *_network(answer, settings.nic),
            *clock(answer["skew_s"], answer["skew_bound_s"]),
        ]
        found += [HostFinding(host, *problem) for problem in problems]
    return found


def unlike(answers: Mapping[str, Mapping[str, Any]]) -> list[HostFinding]:
    """Return which hosts have other hardware than most."""
    told = {host: a for host, a in answers.items() if "problem" not in (a["gpus"] or {})}
    models = {host: devices.models(answer["gpus"]) for host, answer in told.items()}
    drivers = {host: version for host, answer in told.items() if (version := devices.drivers(answer["gpus"]))}
    cores = {host: f"{answer['cores']} cores" for host, answer in told.items() if not answer["gpus"]}
    found = []
    for host, text in _odd(models).items():
        severity = "error" if models[host] == devices.NO_GPU else "warning"
        found.append(
            HostFinding(host, "gpu model", severity, f"{text}; leave it out, or expect the others to wait for it")
        )
    for host, text in _odd(drivers).items():
        found.append(HostFinding(host, "gpu driver", "warning", f"{text}; install the same"))
    for host, text in _odd(cores).items():
        found.append(
            HostFinding(host, "cores", "warning", f"{text}; leave it out, or expect the others to wait for it")
        )
    return found


def _odd(values: Mapping[str, str]) -> dict[str, str]:
    """Return the hosts whose value is not the most frequent one, in words; of several, one with GPUs, and the first."""
    counts = Counter(values.values())
    usual = max(counts, key=lambda value: (counts[value], value != devices.NO_GPU), default="")
    votes = counts[usual]
    have = "has" if votes == 1 else "have"
    return {
        host: f"has {value}, {votes} of {len(values)} hosts {have} {usual}"
        for host, value in values.items()
        if value != usual
    }


def clock(skew_s: float, bound_s: float) -> list[Problem]:
    """Judge a clock by how far it is ahead of this machine's, which is known up to `bound_s`.

    The host read its clock at some moment of its answer, half of which is the bound. NaN is as wrong as a year.
    """
    if abs(skew_s) <= MAX_SKEW_S + bound_s:
        return []
    known = f"(known to {bound_s:.1f} s, {MAX_SKEW_S:g} s are allowed)"
    fix = "start chrony or ntpd there, or here if other hosts say the same"
    return [("clock", "error", f"its clock is {skew_s:+.1f} s from this machine's {known}; {fix}")]


def _software(answer: Mapping[str, Any], own: Own) -> list[Problem]:
    found = []
    if answer["python"] != own.python:
        text = f"Python {answer['python']} at {answer['executable']}, here {own.python}; install the same"
        found.append(("python", "error", text))
    if answer["code"] != own.code:
        found.append(("code", "error", "another version of llama_ds than here; copy this checkout to it"))
    theirs = answer["packages"]
    differ = [
        f"{name} {theirs.get(name, 'absent')} (here {own.packages.get(name, 'absent')})"
        for name in sorted({**theirs, **own.packages})
        if theirs.get(name) != own.packages.get(name)
    ]
    if differ:
        more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
        found.append(("packages", "error", f"{', '.join(differ[:4])}{more}; install from the same constraints.txt"))
    return found


def _disks(answer: Mapping[str, Any], own: Own, min_free_gib: float) -> list[Problem]:
    found = []
    for path, left in answer["free"].items():
        least = SHM_GIB if path == "/dev/shm" else min_free_gib
        if left is None:
            found.append(("disk", "error", f"{path} cannot be looked at; mount it"))
        elif left < least * GIB:
            found.append(("disk", "error", f"{path} has {left / GIB:.2f} GiB free, {least:g} are wanted; make room"))
    for path, why in answer["unwritable"].items():
        found.append(("disk", "error", f"{path} cannot be written: {why}; make room, or mount it for writing"))
    for path, nonce in own.nonce.items():
        if answer["shared"].get(path) != nonce:
            folder = path.rpartition("/")[0]
            text = f"does not see what is written to {folder} here; mount the same folder there, or set output_dir"
            found.append(("shared folder", "error", text))
    found += [("file", "error", f"{path} is not there; copy or mount it") for path in answer["missing"]]
    return found


def _network(answer: Mapping[str, Any], nic: str) -> list[Problem]:
    nics = answer["nics"]
    if nic and nic not in nics:
        return [("nic", "error", f"no interface {nic}; it has {', '.join(nics)}; give another --nic")]
    if nic and nics[nic] == "down":
        return [("nic", "error", f"interface {nic} is down; plug it in, or set it up")]
    return []


def promote(
    hosts: Mapping[str, int], good: list[str], spares: Mapping[str, int], world: int | None = None
) -> dict[str, int] | None:
    """Return the hosts with spares in the places of bad ones; None when fewer than `world` slots are good.

    Others keep their places, and so their ranks.
    """
    left = [host for host in spares if host in good]
    chosen: dict[str, int] = {}
    for host, slots in hosts.items():
        place = host if host in good else next((s for s in left if spares[s] >= slots), None)
        if place is not None:
            chosen[place] = slots
            left = [s for s in left if s != place]
    return chosen if sum(chosen.values()) >= (world or sum(hosts.values())) else None
