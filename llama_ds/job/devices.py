"""Which CUDA devices the ranks of a host use: chosen by the launcher, passed to ranks in a variable.

DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES to 0, 1, .. for as many slots as the hostfile has, whatever its user has
set: on a shared machine these are another user's devices. Ranks set it again, before they use CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llama_ds.errors import UserError

VARIABLE = "LLAMA_DS_DEVICES"  # passes `encode`'s text to the ranks
VISIBLE = "CUDA_VISIBLE_DEVICES"
BACKEND = "LLAMA_DS_BACKEND"  # "gloo" lets ranks share a device, which NCCL refuses
_NONE = ("-", "NoDevFiles")  # values that begin like this hide all devices


def visible_devices(slots: Mapping[str, Sequence[int]], here: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return CUDA_VISIBLE_DEVICES for each host whose ranks must not simply use its first devices.

    `slots` are the chosen slots of each host. Those of `here`, the host that is this machine if one is, count among the
    devices that the shell's own CUDA_VISIBLE_DEVICES lists, as for any program that is started from it.

    Raises:
        UserError: it lists too few.
    """
    found: dict[str, str] = {}
    if environ.get("DS_ACCELERATOR") == "cpu":
        return found
    for host, chosen in slots.items():
        listed = environ.get(VISIBLE) if host == here else None
        if listed is not None:
            found[host] = _among(listed, chosen, host)
        elif list(chosen) != list(range(len(chosen))):
            found[host] = ",".join(map(str, chosen))
    return found


def encode(hosts: Mapping[str, int], devices: Mapping[str, str]) -> str:
    """Return `devices` by ranks, as in `0-1:2+3@8-9:6+7`: shells and launchers leave these characters alone."""
    entries, first = [], 0
    for host, count in hosts.items():
        if host in devices:
            entries.append(f"{first}-{first + count - 1}:{devices[host].replace(',', '+')}")
        first += count
    return "@".join(entries)


def decode(text: str, rank: int) -> str | None:
    """Return CUDA_VISIBLE_DEVICES of a rank from `encode`'s text, None to leave it as it is."""
    for entry in filter(None, text.split("@")):
        ranks, _, devices = entry.partition(":")
        first, _, last = ranks.partition("-")
        if int(first) <= rank <= int(last):
            return devices.replace("+", ",")
    return None


def _among(listed: str, chosen: Sequence[int], host: str) -> str:
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not names or names[0].startswith(_NONE):
        return ""
    if max(chosen) >= len(names):
        raise UserError(
            f"{VISIBLE}={listed}: lists {len(names)} of the devices, and the job uses slot {max(chosen)} of {host}, "
            f"counted from 0 among them; list more, or use fewer slots (in the hostfile, or --include {host}:0)"
        )
    return ",".join(names[slot] for slot in chosen)
