"""Problems of a host's GPUs, from the output of nvidia-smi and the kernel log."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llama_ds.layout.flops import device_peak

Problem = tuple[str, str, str]  # check, severity, text

NO_GPU = "no GPU"
MAX_TEMPERATURE = 85  # Celsius, without load: an A100 throttles slightly above
# Bits of nvidia-smi's clock event reasons that indicate a fault (NVML's nvmlClocksEventReasons). The others are
# idleness, power caps and clocks set by a user.
SLOWDOWNS = {
    0x08: ("error", "by its hardware"),
    0x20: ("warning", "by the driver, for its heat"),
    0x40: ("error", "by its hardware, for its heat"),
    0x80: ("error", "by its hardware, for its power supply"),
}
# Xids for which NVIDIA's catalogue (docs.nvidia.com/deploy/xid-errors) recommends a GPU reset or a host restart.
# Application errors cause most of the others (13, 31, 43, 45).
BAD_XIDS = {48, 62, 64, 74, 79, 95, 119, 120}
PROGRAMS_XIDS = {13, 31, 43, 45}
RECENT_S = 86400.0  # an older Xid counts as repaired: the log keeps it until the host restarts


def problems(gpus: Mapping[str, Any] | None, xids: list[Mapping[str, Any]], slots: int) -> list[Problem]:
    """Return the problems of a host's GPUs; `gpus` is None without nvidia-smi."""
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
        fix = "reset the GPU, restart the host, or repair its driver"
        yield "gpu", "error", f"nvidia-smi reports {gpus['problem']!r}; {fix}"
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
            yield "gpu", "error", f"{name}: nvidia-smi reports {text!r} for its {field}; reset it, or restart the host"
            return
    errors = number(device["ecc.errors.uncorrected.volatile.total"])
    if errors:
        fix = f"0 are allowed; reset it (nvidia-smi --gpu-reset -i {index}), replace it if they come back"
        yield "ecc", "error", f"{name} has {errors:.0f} uncorrected ECC errors since its last reset, {fix}"
    heat = number(device["temperature.gpu"])
    if heat is not None and heat >= MAX_TEMPERATURE:
        fix = f"the limit is {MAX_TEMPERATURE}; look for other work on it, at its fans and its air flow"
        yield "temperature", "warning", f"{name} has {heat:.0f} C without load, {fix}"
    reasons = device["slowdown"]
    bits = int(reasons, 16) if re.fullmatch(r"0x[0-9A-Fa-f]+", reasons) else 0
    found = {bit: SLOWDOWNS[bit] for bit in SLOWDOWNS if bits & bit}
    if found:
        severity = min(severity for severity, _ in found.values())  # "error" comes before "warning"
        how = " and ".join(how for _, how in found.values())
        fix = "look at its cooling and its power supply"
        yield "slowed down", severity, f"{name} is slowed down {how} (clocks_event_reasons.active {reasons}); {fix}"


def without_fp8(gpus: Mapping[str, Any] | None) -> Iterator[Problem]:
    """Yield a problem for each model of GPU that is known to have no products in float8."""
    for name in sorted({device["name"] for device in (gpus or {}).get("devices", ())}):
        if device_peak(name, "fp32") and not device_peak(name, "fp8"):
            yield "fp8", "error", f"{name} has no products in float8; set compute.fp8=off, or use Hopper or newer"


def number(text: str) -> float | None:
    """Return a number printed by nvidia-smi, None for "[N/A]", "[Not Supported]" and the like."""
    try:
        return float(text)
    except ValueError:
        return None


def models(gpus: Mapping[str, Any] | None) -> str:
    """Return a description of a host's GPU models, NO_GPU without a GPU."""
    found = {f"{d['name']}, {d['memory.total']} MiB" for d in (gpus or {}).get("devices", ())}
    return " and ".join(sorted(found)) or NO_GPU


def drivers(gpus: Mapping[str, Any] | None) -> str:
    """Return the driver's version, "" without a GPU."""
    return " and ".join(sorted({d["driver_version"] for d in (gpus or {}).get("devices", ())}))
