"""The rendezvous of a job: address and port of rank 0, and the address on which the supervisor listens.

The first host is asked over ssh. Its SSH_CONNECTION holds two addresses that certainly reach each other, while host
names need not resolve everywhere; under srun, SLURM_LAUNCH_NODE_IPADDR is the first of them. If the first host is this
machine, the next one is asked how it sees it: the SSH_CONNECTION of a shell here belongs to its user's login, from a
network that hosts may not see.
"""

from __future__ import annotations

import inspect
import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from llama_ds.errors import UserError
from llama_ds.launch import remote
from llama_ds.machine import free_port

LOOPBACK = "127.0.0.1"
_ASK = (
    f"import json, os, random, socket, sys\n{inspect.getsource(free_port)}"
    + """
nic, other, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
def own_towards(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return probe.getsockname()[0]
def of_interface(name):
    import fcntl, struct
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return socket.inet_ntoa(fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))[20:24])
found = {"ssh": os.environ.get("SSH_CONNECTION", "").split()}
srun = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
if srun and not found["ssh"]:
    found["ssh"] = [srun, "0", own_towards(srun), "0"]
try:
    found["nic"] = of_interface(nic) if nic else None
except OSError:
    found["nic"] = ""
    found["nics"] = [name for _, name in socket.if_nameindex()]
try:
    found["towards"] = own_towards(socket.gethostbyname(other)) if other else None
except OSError:
    found["towards"] = None
try:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))
    found["port"] = port or free_port()
except OSError as error:
    found["port"], found["taken"] = 0, error.strerror or str(error)
print()
print(json.dumps(found))
"""
)


@dataclass(frozen=True)
class Rendezvous:
    """The addresses at which the processes of a job find each other."""

    master: str  # address of rank 0's host
    port: int  # a port of that host that was free when checked
    listen: str  # this machine's address as seen by the hosts


class UnreachableHost(UserError):
    """A host that the rendezvous needs does not answer."""

    def __init__(self, host: str, message: str) -> None:
        super().__init__(message)
        self.host = host


def arrange(
    hosts: Sequence[str], nic: str = "", port: int = 0, master: str = "", ssh_port: int | None = None
) -> Rendezvous:
    """Return the rendezvous of the ranks on `hosts`.

    By default the port is a free one, and the address is the first host's on the network that routes to the second.
    `nic`, `port` and `master` override these.

    Raises:
        UnreachableHost: the first host does not answer, or the one that is asked for the address of this machine.
        UserError: the first host has no such interface or no free port.
    """
    first, second = hosts[0], next(iter(hosts[1:]), "")
    found = _ask("first", first, [nic, second, str(port)], ssh_port)
    if found["nic"] == "":
        raise UserError(
            f"--nic {nic}: {first} has no such interface with an address; it has {', '.join(found['nics'])}"
        )
    if not found["port"]:
        raise UserError(f"--master-port {port}: cannot be used on {first} ({found['taken']}); give another, or none")
    listen, server = _seen_by(found)
    other = next((host for host in hosts[1:] if not remote.is_local(host)), None)
    if is_loopback(listen) and other:  # the first host is this machine
        listen, _ = _seen_by(_ask("next", other, ["", "", "0"], ssh_port))
        server = listen
    towards = found["towards"] if found["towards"] and not is_loopback(found["towards"]) else None
    return Rendezvous(master or found["nic"] or towards or server, found["port"], listen)


def own_address_towards(address: str) -> str | None:
    """Return this machine's address on the route to `address`, None without a route. No packet is sent."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return None


def is_loopback(address: str) -> bool:
    """Return whether an IP address is a host's own."""
    return address == "::1" or address.startswith("127.")


def _ask(which: str, host: str, arguments: Sequence[str], ssh_port: int | None) -> dict[str, Any]:
    answer = remote.on_hosts([host], [sys.executable, "-I", "-c", _ASK, *arguments], port=ssh_port)[host]
    if answer.problem:
        raise UnreachableHost(
            host,
            f"{host}: the {which} host does not answer ({answer.problem}); run tools/preflight.py, or take it out",
        )
    try:
        found: dict[str, Any] = json.loads(answer.out.strip().splitlines()[-1])
        return found
    except (ValueError, IndexError):
        raise UserError(f"{host}: answers {answer.out[:80]!r}; its shell must print nothing for commands") from None


def _seen_by(found: dict[str, Any]) -> tuple[str, str]:
    """Return this machine's address for a host, and the host's address for this machine, from the host's answer."""
    if len(found["ssh"]) != 4:
        return LOOPBACK, LOOPBACK
    client, _, server, _ = found["ssh"]
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    # Over a jump host or a translated address the host sees another machine's.
    return (client if client in own else own_address_towards(server) or client), server
