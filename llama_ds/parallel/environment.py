"""Checked reading of the environment variables that describe a process and are numbers or names."""

from __future__ import annotations

import os
import re
import socket

import psutil

from llama_ds.errors import UserError, shortened
from llama_ds.job.devices import BACKEND

MOST_RANKS = 10**7
ACCELERATORS = ("cuda", "cpu")
_NUMBERS = {  # variables that torch and DeepSpeed read: smallest and largest value
    "MASTER_PORT": (0, 65535),
    "DEEPSPEED_TIMEOUT": (1, 10**6),  # minutes
}


def first_number(names: tuple[str, ...], least: int) -> int | None:
    """Return the number in the first of these variables that is set, None if none is.

    Raises:
        UserError: it is not a whole number from `least` to `MOST_RANKS`.
    """
    return next((_number(name, least, MOST_RANKS) for name in names if name in os.environ), None)


def check_others() -> None:
    """Check the variables that libraries read on their own, and report with a traceback.

    Raises:
        UserError: a value is not of its kind.
    """
    for name, (least, most) in _NUMBERS.items():
        if name in os.environ:
            _number(name, least, most)
    if os.environ.get("MASTER_ADDR") == "":
        raise UserError("environment: MASTER_ADDR is empty; set it to the address of rank 0's host, or unset it")
    interfaces = psutil.net_if_addrs()
    for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(","):
        if name and name not in interfaces:
            raise UserError(
                f"environment: GLOO_SOCKET_IFNAME = {shortened(repr(name))} is no network interface of "
                f"{socket.gethostname()}, which has {', '.join(sorted(interfaces))}; correct it, or unset it"
            )
    accelerator = os.environ.get("DS_ACCELERATOR", "cpu")
    if accelerator not in ACCELERATORS:
        raise UserError(
            f"environment: DS_ACCELERATOR = {shortened(repr(accelerator))} is not {' or '.join(ACCELERATORS)}; "
            "unset it to use what is there"
        )
    if os.environ.get(BACKEND, "gloo") != "gloo":
        raise UserError(
            f"environment: {BACKEND} = {shortened(repr(os.environ[BACKEND]))} is not gloo, which lets ranks share a "
            "GPU; unset it for one rank on each"
        )


def _number(name: str, least: int, most: int) -> int:
    text = os.environ[name]
    value = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1
    if not least <= value <= most:
        raise UserError(
            f"environment: {name} = {shortened(repr(text))} is not a whole number from {least} to {most}; correct it, "
            "or unset it"
        )
    return value
