"""Faults of a job on real hosts: what each of them does to the job, and what the job must make of it."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from cluster import Job, send, slow_links

from llama_ds.job.memory_slots import HEADER_BYTES, whole_slots
from tests.hosts import Hosts

# Fault -> the outcome that the supervisor must report, None if the ranks go on.
KINDS: dict[str, str | None] = {
    "killed": "death",
    "killed while saving": "death",
    "stopped": "hang",
    "cut off": "host lost",
    "powered off": "host lost",
    "two hosts at once": "host lost",
    "slow link": None,
    "disk full": None,
    "pdsh": "launcher",
    "launcher of a host": None,  # its ranks do not need it
    "warm process": None,
    "weights": "corruption",
    "masters": "corruption",
    "moments": "corruption",
    "activations of the checked layer": "corruption",
    "weight gradients of the checked layer": "corruption",
    "state on its way to another host": None,  # refused there, and sent again after the next step
    "state in memory": "death",  # its rank is killed, so that it is read
}
# What stands for them after a warm restart, where no launcher runs.
WARM = {"pdsh": "warm process", "launcher of a host": "warm process"}
FLIPS = tuple(kind for kind, outcome in KINDS.items() if outcome == "corruption" or kind.startswith("state on"))
SLOW_S, FULL_S = 15.0, 12.0  # how long a link is slow, and a disk full
LINK_MBIT = 8
DISK_BYTES = 2 << 30  # the preflight wants 1 GiB to be free


@dataclass
class Site:
    """A job and what faults need to reach it."""

    job: Job
    hosts: Hosts
    memory: Path  # the job's checkpoint.memory_folder
    disk: Path  # the file system of the run's folder
    requests: Path  # where ranks look for flips
    chance: random.Random


@dataclass
class Injected:
    """A fault that has been put into a job."""

    hosts: list[str]
    ranks: list[int]
    repair: Callable[[], object] = lambda: None
    lasts_s: float = 0.0  # repaired after this time; 0: when the job goes on
    about: dict[str, Any] = field(default_factory=dict)


def inject(kind: str, site: Site) -> Injected:
    """Put a fault into a job."""
    job, hosts, chance = site.job, site.hosts, site.chance
    active = list(job.named("attempt started")[-1]["hosts"])
    rank = chance.randrange(len(active))
    host = active[rank]
    injected = Injected([host], [rank])
    if kind == "cut off":
        hosts.unplug(host)
        injected.repair = lambda: hosts.plug(host)
    elif kind == "powered off":
        lose(host, site)
        injected.repair = lambda: hosts.start(host)
    elif kind == "two hosts at once":
        other = chance.choice([name for name in active if name != host])
        injected.hosts, injected.ranks = [host, other], sorted([rank, active.index(other)])
        hosts.unplug(host)
        lose(other, site)

        def repair() -> None:
            hosts.plug(host)
            hosts.start(other)

        injected.repair = repair
    elif kind == "slow link":
        hosts.run(host, slow_links(1).replace("add", "change"))
        injected.repair = lambda: hosts.run(host, slow_links(LINK_MBIT).replace("add", "change"))
        injected.lasts_s = SLOW_S
    elif kind == "disk full":
        fill(site.disk)
        injected.repair, injected.lasts_s = (lambda: resize(site.disk, DISK_BYTES)), FULL_S
        injected.hosts, injected.ranks = [], []
    elif kind == "pdsh":
        every = psutil.Process(job.process.pid).children(recursive=True)
        send(next(process for process in every if process.name() == "pdsh.bin"), signal.SIGKILL)
    elif kind == "launcher of a host":
        send(hosts.processes(host, "deepspeed.launcher.launch")[-1], signal.SIGKILL)
    elif kind == "warm process":
        for process in hosts.processes(host, "llama_ds/standby.py")[:1]:  # before an attempt's first step there is none
            send(process, signal.SIGKILL)
    elif kind in FLIPS:
        injected.about = request_flip(kind, rank, site)
    else:
        (victim,) = job.ranks(host)
        if kind == "killed while saving":
            job.wait_for_save()
            injected.about = {"save_cut_short": job.saves}
        send(victim, signal.SIGSTOP if kind in ("stopped", "state in memory") else signal.SIGKILL)
        if kind == "state in memory":
            injected.about = {"damaged": damage_states(host, rank, site)}
            send(victim, signal.SIGKILL)
    return injected


def request_flip(kind: str, rank: int, site: Site) -> dict[str, Any]:
    """Ask a rank to flip a random bit; return which one."""
    chance = site.chance
    request = {"layer": chance.random(), "element": chance.random(), "bit": chance.randrange(32)}
    path = site.requests / f"flip_{rank}.json"
    path.with_suffix(".new").write_text(json.dumps({"site": kind, **request}))
    path.with_suffix(".new").rename(path)
    return request


def fill(disk: Path) -> None:
    """Leave a file system in memory no room; it cannot be made smaller than what it holds, which grows meanwhile."""
    for _ in range(100):
        with suppress(subprocess.CalledProcessError):
            return resize(disk, shutil.disk_usage(disk).used)
    raise AssertionError(f"{disk} grows too fast")


def resize(disk: Path, size: int) -> None:
    """Change the size of a file system in memory."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def lose(host: str, site: Site) -> None:
    """Power a host off, and lose what was in its memory."""
    site.hosts.power_off(host)
    for folder in site.memory.glob(f"*/{host}"):
        shutil.rmtree(folder)


def damage_states(host: str, rank: int, site: Site) -> list[int]:
    """Flip a bit in each state of a rank in its host's memory; return their steps."""
    steps = []
    for folder in site.memory.glob(f"*/{host}"):
        for owner, slot in whole_slots(folder):
            if owner == rank:
                with open(slot.path, "r+b") as file:
                    file.seek(HEADER_BYTES + site.chance.randrange(len(slot.payload)))
                    byte = file.read(1)[0] ^ 1 << site.chance.randrange(8)
                    file.seek(-1, 1)
                    file.write(bytes([byte]))
                steps.append(slot.step)
    return sorted(steps)
