"""The rendezvous of a job: address and port of rank 0, and the address on which the supervisor listens.

The first host is asked over ssh. Its SSH_CONNECTION holds two addresses that certainly reach each other, while host
names need not resolve everywhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from llama_ds.errors import UserError
from llama_ds.launch import remote

_ASK = """
import json, os, socket, sys
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
try:
    found["nic"] = of_interface(nic) if nic else None
except OSError:
    found["nic"] = ""
    found["nics"] = [name for _, name in socket.if_nameindex()]
try:
    found["towards"] = own_towards(socket.gethostbyname(other)) if other else None
except OSError:
    found["towards"] = None
with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(("", port))
        found["port"] = probe.getsockname()[1]
    except OSError as error:
        found["port"], found["taken"] = 0, error.strerror
print()
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Rendezvous:
    """The addresses at which the processes of a job find each other."""

    master: str  # address of rank 0's host
    port: int  # a port of that host that was free when checked
    listen: str  # this machine's address as seen by the hosts


def arrange(
    hosts: Sequence[str], nic: str = "", port: int = 0, master: str = "", ssh_port: int | None = None
) -> Rendezvous:
    """Return the rendezvous of the ranks on `hosts`.

    By default the port is a free one, and the address is the first host's on the network that routes to the second.
    `nic`, `port` and `master` override these.

    Raises:
        UserError: the first host does not answer, or has no such interface or no free port.
    """
    first, second = hosts[0], next(iter(hosts[1:]), "")
    argv = [sys.executable, "-I", "-c", _ASK, nic, second, str(port)]
    answer = remote.on_hosts([first], argv, port=ssh_port)[first]
    if answer.problem:
        raise UserError(
            f"{first}: the first host does not answer ({answer.problem}); run tools/preflight.py, or take it out"
        )
    try:
        found = json.loads(answer.out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise UserError(f"{first}: answers {answer.out[:80]!r}; its shell must print nothing for commands") from None
    if found["nic"] == "":
        raise UserError(
            f"--nic {nic}: {first} has no such interface with an address; it has {', '.join(found['nics'])}"
        )
    if not found["port"]:
        raise UserError(f"--master-port {port}: cannot be used on {first} ({found['taken']}); give another, or none")
    client, _, server, _ = found["ssh"] if len(found["ssh"]) == 4 else ("127.0.0.1", "", "127.0.0.1", "")
    towards = found["towards"] if found["towards"] and not found["towards"].startswith("127.") else None
    return Rendezvous(master or found["nic"] or towards or server, found["port"], client)
