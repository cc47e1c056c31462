"""Simulated hosts on this machine: their links have the requested bandwidth and latency. Needs root."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llama_ds.launch.namespaces import Hosts, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
BYTES, RATE_MBIT, DELAY_MS = 1_000_000, 20, 25

ANSWER = """
import socket
connection, _ = socket.create_server(("0.0.0.0", 5000)).accept()
while connection.recv(1 << 20):
    connection.sendall(b".")
"""
ASK = f"""
import socket, sys, time
for _ in range(100):
    try:
        connection = socket.create_connection((sys.argv[1], 5000))
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
start = time.monotonic()
connection.sendall(b"x")
connection.recv(1)
print(time.monotonic() - start)
start = time.monotonic()
connection.sendall(bytes({BYTES}))
connection.shutdown(socket.SHUT_WR)
while connection.recv(1 << 16):
    pass
print(time.monotonic() - start)
"""


def test_link_has_its_bandwidth_and_latency(tmp_path: Path) -> None:
    """The bounds are exact lower bounds: no packet is early. The bucket lets 64 kB pass at once."""
    with Hosts(2, RATE_MBIT, DELAY_MS) as hosts:
        answering = subprocess.Popen(hosts.command(1, [sys.executable, "-c", ANSWER]))
        asked = subprocess.run(
            hosts.command(0, [sys.executable, "-c", ASK, hosts.address(1)]), capture_output=True, text=True, timeout=60
        )
        answering.wait(10)
        names = list(hosts.names)
    round_trip, transfer = map(float, asked.stdout.split())
    assert round_trip >= 2 * DELAY_MS / 1e3
    assert transfer >= (BYTES - 64_000) * 8 / (RATE_MBIT * 1e6)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(name in left for name in names)
