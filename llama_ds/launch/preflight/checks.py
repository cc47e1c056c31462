"""From what hosts say of themselves to what is wrong with them: pure functions.

Code, Python and packages must be those of the machine that launches. Hardware is compared with what most hosts have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 2**30
MAX_SKEW_S = 2.0  # logs and checkpoints of hosts are read together
MAX_TEMPERATURE = 85  # Celsius: an A100 slows itself down a little above
SHM_GIB = 1.0  # NCCL's and the data's shared memory
# Bits of clocks_throttle_reasons.active that mean trouble: hardware slowdown, thermal and power brake (NVML's names).
BAD_THROTTLE = 0x8 | 0x40 | 0x80


@dataclass(frozen=True)
class Finding:
    """What is right or wrong with a host."""

    host: str
    check: str
    severity: str  # ok | warning | error
    text: str


@dataclass(frozen=True)
class Own:
    """What the launching machine has, to compare with."""

    python: str
    packages: Mapping[str, str]
    code: str
    nonce: Mapping[str, str]  # what stands in the files that must be shared


def judge(answers: Mapping[str, Mapping[str, Any]], own: Own, slots: Mapping[str, int], settings: Any) -> list[Finding]:
    """Return what is wrong with each host that has answered."""
    usual = Counter(_hardware(answer) for answer in answers.values()).most_common(1)
    found: list[Finding] = []
    for host, answer in answers.items():
        problems = [
            *_software(answer, own),
            *_disks(answer, own, settings.min_free_gib),
            *_devices(answer, slots[host]),
            *_rest(answer, settings.nic),
        ]
        if usual and _hardware(answer) != usual[0][0]:
            text = f"has {_hardware(answer)}, most hosts {usual[0][0]}"
            problems.append(("hardware", "warning", text))
        found += [Finding(host, *problem) for problem in problems]
    return found


def _software(answer: Mapping[str, Any], own: Own) -> list[tuple[str, str, str]]:
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


def _disks(answer: Mapping[str, Any], own: Own, min_free_gib: float) -> list[tuple[str, str, str]]:
    found = []
    for path, left in answer["free"].items():
        least = SHM_GIB if path == "/dev/shm" else min_free_gib
        if left is None:
            found.append(("disk", "error", f"{path} cannot be looked at"))
        elif left < least * GIB:
            found.append(("disk", "error", f"{path} has {left / GIB:.2f} GiB free, {least:g} are wanted; make room"))
    found += [("disk", "error", f"{path} cannot be written: {why}") for path, why in answer["unwritable"].items()]
    for path, text in own.nonce.items():
        if answer["shared"].get(path) != text:
            found.append(("shared folder", "error", f"does not see what is written to {path.rpartition('/')[0]} here"))
    found += [("file", "error", f"{path} is not there") for path in answer["missing"]]
    return found


def _devices(answer: Mapping[str, Any], slots: int) -> list[tuple[str, str, str]]:
    gpus = answer["gpus"]
    found: list[tuple[str, str, str]] = [("xid", "warning", line) for line in answer["xids"][-1:]]
    if gpus is None:
        return found
    if "problem" in gpus:
        return [*found, ("gpu", "error", f"nvidia-smi: {gpus['problem']}")]
    if len(gpus["devices"]) < slots:
        found.append(("gpu", "error", f"{len(gpus['devices'])} GPUs for {slots} slots"))
    for device in gpus["devices"]:
        name = f"GPU {device['index']}"
        if (errors := _number(device["ecc.errors.uncorrected.volatile.total"])) and errors > 0:
            found.append(("ecc", "error", f"{name} has {errors:.0f} uncorrected ECC errors; reset or replace it"))
        if (heat := _number(device["temperature.gpu"])) and heat >= MAX_TEMPERATURE:
            found.append(("temperature", "warning", f"{name} has {heat:.0f} C"))
        reasons = device["clocks_throttle_reasons.active"]
        if reasons.lower().startswith("0x") and int(reasons, 16) & BAD_THROTTLE:
            found.append(("throttling", "error", f"{name} is slowed down by its hardware ({reasons})"))
    return found


def _rest(answer: Mapping[str, Any], nic: str) -> list[tuple[str, str, str]]:
    found = []
    if abs(answer["skew_s"]) > MAX_SKEW_S + answer["skew_bound_s"]:
        found.append(("clock", "error", f"its clock is {answer['skew_s']:+.1f} s off; start chrony or ntpd"))
    if nic and nic not in answer["nics"]:
        found.append(("nic", "error", f"no interface {nic}; it has {', '.join(answer['nics'])}"))
    elif nic and answer["nics"][nic] == "down":
        found.append(("nic", "error", f"interface {nic} is down"))
    return found


def _hardware(answer: Mapping[str, Any]) -> str:
    gpus = answer["gpus"]
    if not gpus or "devices" not in gpus:
        return f"{answer['cores']} cores, no GPU"
    kinds = Counter(f"{d['name']}, driver {d['driver_version']}" for d in gpus["devices"])
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))


def _number(text: str) -> float | None:
    """Return a number of nvidia-smi's, None for "[N/A]" and its like."""
    try:
        return float(text)
    except ValueError:
        return None


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
