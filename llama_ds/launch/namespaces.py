"""Simulated hosts on one Linux machine: network namespaces joined by links of a given bandwidth and latency.

Each host is a namespace with a TUN device. A process forwards packets between the devices with the latency, and the
kernel's token bucket filter limits each sender to the bandwidth. Neighbours can have links of their own without a
limit, as the GPUs of a node have beside their network adapters. Needs root, iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import fcntl
import heapq
import multiprocessing
import os
import select
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from itertools import combinations
from multiprocessing.process import BaseProcess
from types import TracebackType

from llama_ds.errors import UserError

TUN = "/dev/net/tun"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU = 9000
INTERFACE = "link0"  # name of the shaped interface on every host


def missing() -> str | None:
    """Return the reason why this machine cannot create such hosts, or None."""
    if os.geteuid() != 0:
        return "root is needed to make network namespaces"
    for program in ("ip", "tc"):
        if not shutil.which(program):
            return f"{program} of the package iproute2 is not installed"
    return None if os.path.exists(TUN) else f"{TUN} does not exist"


class Hosts:
    """A context in which `count` hosts exist, with a link in each direction between every pair."""

    def __init__(self, count: int, rate_mbit: float, delay_ms: float, neighbours: int = 1) -> None:
        """Take the shape of the links; those within each `neighbours` hosts in order have no limit and no latency.

        Raises:
            UserError: this machine cannot create such hosts.
        """
        reason = missing()
        if reason:
            raise UserError(f"shaped links: {reason}")
        self.names = [f"llama{os.getpid()}-{i}" for i in range(count)]
        self._rate, self._delay, self._neighbours = rate_mbit, delay_ms / 1e3, neighbours
        self._devices: list[int] = []
        self._carrier: BaseProcess | None = None

    def __enter__(self) -> Hosts:
        try:
            for i, name in enumerate(self.names):
                self._make(i, name)
            for i, j in combinations(range(len(self.names)), 2):
                if i // self._neighbours == j // self._neighbours:
                    self._join(i, j)
            fork = multiprocessing.get_context("fork")  # the child inherits the open devices
            carrier = fork.Process(target=carry, args=(self._devices, self._delay), daemon=True)
            carrier.start()
            self._carrier = carrier
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def address(self, host: int) -> str:
        """Return a host's address."""
        return f"10.97.0.{host + 1}"

    def command(self, host: int, argv: list[str]) -> list[str]:
        """Return the command that runs `argv` on a host."""
        return ["ip", "netns", "exec", self.names[host], *argv]

    def _make(self, host: int, name: str) -> None:
        outside = f"lt{os.getpid() % 10**7}-{host}"
        device = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
        self._devices.append(device)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", outside.encode(), _IFF_TUN | _IFF_NO_PI))
        _run("ip", "netns", "add", name)
        _run("ip", "link", "set", outside, "netns", name)
        inside = ("ip", "-n", name)
        _run(*inside, "link", "set", outside, "name", INTERFACE, "mtu", str(MTU))
        _run(*inside, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "link", "set", INTERFACE, "up")
        shape = ("rate", f"{self._rate}mbit", "burst", "64kb", "limit", "64mb")
        _run("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "tbf", *shape)

    def _join(self, first: int, second: int) -> None:
        """Give two hosts a link of their own, over which the addresses of their shaped links are reached."""
        own, other = self.names[first], self.names[second]
        ends = {first: f"to{second}", second: f"to{first}"}
        peer = ("peer", "name", ends[second], "netns", other)
        _run("ip", "link", "add", "name", ends[first], "netns", own, "type", "veth", *peer)
        for host, to in ((first, second), (second, first)):
            inside = ("ip", "-n", self.names[host])
            _run(*inside, "link", "set", ends[host], "mtu", str(MTU), "up")
            _run(*inside, "route", "add", f"{self.address(to)}/32", "dev", ends[host], "src", self.address(host))

    def _remove(self) -> None:
        if self._carrier:
            self._carrier.kill()
            self._carrier.join()
        for device in self._devices:
            os.close(device)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def carry(devices: list[int], delay_s: float) -> None:
    """Forward IPv4 packets between TUN devices after `delay_s`; the last byte of an address selects its device."""
    poll = select.epoll()
    for device in devices:
        poll.register(device, select.EPOLLIN)
    in_flight: list[tuple[float, int, int, bytes]] = []  # due, number, device, packet
    number = 0
    while True:
        wait = max(in_flight[0][0] - time.monotonic(), 0) if in_flight else -1
        for device, _ in poll.poll(wait):
            for packet in _packets(device):
                if packet[0] >> 4 == 4 and 0 < packet[19] <= len(devices):
                    number += 1
                    target = devices[packet[19] - 1]
                    heapq.heappush(in_flight, (time.monotonic() + delay_s, number, target, packet))
        while in_flight and in_flight[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(in_flight)
            os.write(target, packet)


def _packets(device: int) -> Iterator[bytes]:
    while True:
        try:
            yield os.read(device, MTU + 64)
        except BlockingIOError:
            return


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"shaped links: {' '.join(argv)}: {done.stderr.strip()}")
