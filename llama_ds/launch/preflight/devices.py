"""What is wrong with a host's GPUs, from what nvidia-smi and the kernel's log say of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Problem = tuple[str, str, str]  # check, severity, text

NO_GPU = "no GPU"
MAX_TEMPERATURE = 85  # Celsius, before any work: an A100 slows itself down a little above
# Bits of nvidia-smi's reasons for a lower clock that mean trouble (NVML's nvmlClocksEventReasons). The others are
# idleness, power caps and clocks that somebody has set.
SLOWDOWNS = {
    0x08: ("error", "by its hardware"),
    0x20: ("warning", "by the driver, for its heat"),
    0x40: ("error", "by its hardware, for its heat"),
    0x80: ("error", "by its hardware, for its power supply"),
}
# Xids after which NVIDIA's catalogue (docs.nvidia.com/deploy/xid-errors) wants a GPU reset or its host restarted.
# Programs cause most of the others (13, 31, 43, 45).
BAD_XIDS = {48, 62, 64, 74, 79, 95, 119, 120}
PROGRAMS_XIDS = {13, 31, 43, 45}
RECENT_S = 86400.0  # an older Xid is taken for mended: the log keeps it until the host is started again


def problems(gpus: Mapping[str, Any] | None, xids: list[Mapping[str, Any]], slots: int) -> list[Problem]:
    """Return what is wrong; `gpus` is None where there is no nvidia-smi."""
    return [*_logged(xids), *(_listed(gpus, slots) if gpus is not None else ())]


def _logged(xids: list[Mapping[str, Any]]) -> Iterator[Problem]:
    """Yield the newest Xid of each kind and GPU."""
    found = [(re.search(r"Xid \([^)]*\): (\d+)", xid["text"]), xid) for xid in xids]
    newest = {match[0]: (int(match[1]), xid) for match, xid in found if match}
    for code, xid in newest.values():
        if code in PROGRAMS_XIDS:
            continue
        age = xid["age_s"]
        recent = age is None or age < RECENT_S
        when = "" if age is None else f" {age / 3600:.1f} hours ago"
        severity = "error" if code in BAD_XIDS and recent else "warning"
        yield "xid", severity, f"{xid['text']}{when}; reset that GPU or restart the host; replace the GPU if it returns"


def _listed(gpus: Mapping[str, Any], slots: int) -> Iterator[Problem]:
    if "problem" in gpus:
        fix = "reset the GPU, restart the host, or mend its driver"
        yield "gpu", "error", f"nvidia-smi says {gpus['problem']!r}; {fix}"
        return
    devices = gpus["devices"]
    if len(devices) < slots:
        fix = "restart the host, replace what is missing, or give it fewer slots"
        yield "gpu", "error", f"nvidia-smi lists {len(devices)} GPUs, the hostfile has {slots} slots; {fix}"
    for device in devices:
        yield from _device(device)


def _device(device: Mapping[str, str]) -> Iterator[Problem]:
    index = device["index"]
    name = f"GPU {index} ({device['uuid']})"
    for field, text in device.items():
        if re.search("error|lost|reset|ERR!", text, re.IGNORECASE):
            yield "gpu", "error", f"{name}: nvidia-smi says {text!r} of its {field}; reset it, or restart the host"
            return
    errors = number(device["ecc.errors.uncorrected.volatile.total"])
    if errors:
        fix = f"0 are wanted; reset it (nvidia-smi --gpu-reset -i {index}), replace it if they come back"
        yield "ecc", "error", f"{name} has {errors:.0f} uncorrected ECC errors since its last reset, {fix}"
    heat = number(device["temperature.gpu"])
    if heat is not None and heat >= MAX_TEMPERATURE:
        fix = f"below {MAX_TEMPERATURE} is wanted; look for other work on it, at its fans and its air"
        yield "temperature", "warning", f"{name} has {heat:.0f} C before any work, {fix}"
    reasons = device["slowdown"]
    bits = int(reasons, 16) if re.fullmatch(r"0x[0-9A-Fa-f]+", reasons) else 0
    found = {bit: SLOWDOWNS[bit] for bit in SLOWDOWNS if bits & bit}
    if found:
        severity = min(severity for severity, _ in found.values())  # "error" comes before "warning"
        how = " and ".join(how for _, how in found.values())
        fix = "look at its cooling and its power supply"
        yield "slowed down", severity, f"{name} is slowed down {how} (clocks_event_reasons.active {reasons}); {fix}"


def number(text: str) -> float | None:
    """Return a number of nvidia-smi's, None for "[N/A]", "[Not Supported]" and their like."""
    try:
        return float(text)
    except ValueError:
        return None


def models(gpus: Mapping[str, Any] | None) -> str:
    """Return the kinds of GPU of a host in words, NO_GPU where there is none."""
    found = {f"{d['name']}, {d['memory.total']} MiB" for d in (gpus or {}).get("devices", ())}
    return " and ".join(sorted(found)) or NO_GPU


def drivers(gpus: Mapping[str, Any] | None) -> str:
    """Return the driver's version, "" where there is none."""
    return " and ".join(sorted({d["driver_version"] for d in (gpus or {}).get("devices", ())}))
