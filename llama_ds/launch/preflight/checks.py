"""Findings from the hosts' answers: pure functions.

Code, Python, packages and clock are compared with the launching machine, hardware with the majority of the hosts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_ds.launch.preflight import devices
from llama_ds.launch.preflight.devices import Problem

GIB = 2**30
MAX_SKEW_S = 2.0  # timestamps in logs and checkpoints of different hosts must be comparable
SHM_GIB = 1.0  # minimum free shared memory for NCCL and the data


@dataclass(frozen=True)
class HostFinding:
    """A problem of a host."""

    host: str
    check: str
    severity: str  # warning | error
    text: str


@dataclass(frozen=True)
class LaunchingMachine:
    """Properties of the launching machine, for comparison."""

    python: str
    packages: Mapping[str, str]
    code: str
    nonce: Mapping[str, str]  # contents of the files that all hosts must see, by path


def judge(
    answers: Mapping[str, Mapping[str, Any]], own: LaunchingMachine, slots: Mapping[str, int], settings: Any
) -> list[HostFinding]:
    """Return the problems of each host that has answered."""
    found = unlike(answers)
    for host, answer in answers.items():
        problems = [
            *_software(answer, own),
            *_disks(answer, own, settings.min_free_gib),
            *devices.problems(answer["gpus"], answer["xids"], slots[host]),
            *(devices.without_fp8(answer["gpus"]) if settings.fp8 else ()),
            *_network(answer, settings.nic),
            *clock(answer["skew_s"], answer["skew_bound_s"]),
        ]
        found += [HostFinding(host, *problem) for problem in problems]
    return found


def unlike(answers: Mapping[str, Mapping[str, Any]]) -> list[HostFinding]:
    """Return the hosts whose hardware differs from the majority."""
    known = {host: a for host, a in answers.items() if "problem" not in (a["gpus"] or {})}
    models = {host: devices.models(answer["gpus"]) for host, answer in known.items()}
    drivers = {host: version for host, answer in known.items() if (version := devices.drivers(answer["gpus"]))}
    cores = {host: f"{answer['cores']} cores" for host, answer in known.items() if not answer["gpus"]}
    found = []
    for host, text in _odd(models).items():
        severity = "error" if models[host] == devices.NO_GPU else "warning"
        found.append(
            HostFinding(host, "gpu model", severity, f"{text}; leave it out, or expect the others to wait for it")
        )
    for host, text in _odd(drivers).items():
        found.append(HostFinding(host, "gpu driver", "warning", f"{text}; install the same version"))
    for host, text in _odd(cores).items():
        found.append(
            HostFinding(host, "cores", "warning", f"{text}; leave it out, or expect the others to wait for it")
        )
    return found


def _odd(values: Mapping[str, str]) -> dict[str, str]:
    """Return a text for each host whose value is not the most frequent one; ties go to GPU hosts, then to the first."""
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
    """Check a clock's offset from this machine's, which is known up to `bound_s`.

    The host read its clock at an unknown moment of the request; the bound is half of the request's duration. NaN fails.
    """
    if abs(skew_s) <= MAX_SKEW_S + bound_s:
        return []
    known = f"(known to {bound_s:.1f} s, {MAX_SKEW_S:g} s are allowed)"
    fix = "start chrony or ntpd there, or here if several hosts differ"
    return [("clock", "error", f"its clock is {skew_s:+.1f} s from this machine's {known}; {fix}")]


def _software(answer: Mapping[str, Any], own: LaunchingMachine) -> list[Problem]:
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


def _disks(answer: Mapping[str, Any], own: LaunchingMachine, min_free_gib: float) -> list[Problem]:
    found = []
    for path, left in answer["free"].items():
        minimum = SHM_GIB if path == "/dev/shm" else min_free_gib
        if left is None:
            found.append(("disk", "error", f"{path} cannot be read; mount it"))
        elif left < minimum * GIB:
            text = f"{path} has {left / GIB:.2f} GiB free, the minimum is {minimum:g}; free some space"
            found.append(("disk", "error", text))
    for path, why in answer["unwritable"].items():
        found.append(("disk", "error", f"{path} cannot be written: {why}; free some space, or mount it for writing"))
    for path, nonce in own.nonce.items():
        if answer["shared"].get(path) != nonce:
            folder = path.rpartition("/")[0]
            text = f"does not see files written to {folder} here; mount the same folder there, or set output_dir"
            found.append(("shared folder", "error", text))
    found += [("file", "error", f"{path} does not exist; copy or mount it") for path in answer["missing"]]
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
    """Return the hosts with bad ones replaced by spares, or None if fewer than `world` slots are good.

    Good hosts keep their positions, and so their ranks.
    """
    left = [host for host in spares if host in good]
    chosen: dict[str, int] = {}
    for host, slots in hosts.items():
        member = host if host in good else next((s for s in left if spares[s] >= slots), None)
        if member is not None:
            chosen[member] = slots
            left = [s for s in left if s != member]
    return chosen if sum(chosen.values()) >= (world or sum(hosts.values())) else None
