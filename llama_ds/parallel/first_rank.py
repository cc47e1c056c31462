"""The address of rank 0, if the launcher passes none: from Slurm's list of hosts, or by asking rank 0 over MPI."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

import psutil

from llama_ds.errors import UserError
from llama_ds.job.heartbeat import interface_towards
from llama_ds.job.own_session import starter
from llama_ds.layout.nodelist import from_slurm
from llama_ds.machine import free_port

LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
SLURM_RANK = "SLURM_PROCID"
LOOPBACK = "127.0.0.1"
OUTSIDE = "192.0.2.1"  # an address that is no host's (RFC 5737); the route to it is the default route
_NO_MPI4PY = 3
_MEETING = f"""
import json, os, socket, sys
ours = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what MPI prints is for the user
try:
    from mpi4py import MPI
except ImportError:
    sys.exit({_NO_MPI4PY})
world = MPI.COMM_WORLD
print(world.Get_size(), file=ours, flush=True)
hosts = world.gather(socket.gethostname(), root=0)
if world.Get_rank() == 0:
    print(json.dumps(hosts), file=ours, flush=True)
ours.write(world.bcast(sys.stdin.read(), root=0))
"""


def first_set(names: Sequence[str]) -> str | None:
    """Return the value of the first of these environment variables that is set."""
    return next((os.environ[name] for name in names if name in os.environ), None)


def in_slurm_step() -> bool:
    """Return whether srun started this process, not a batch script or a shell in a Slurm allocation.

    Slurm sets SLURM_PROCID=0 and SLURM_NTASKS for a batch script too. Variables of a step may also be left over from
    the step in which sbatch was called.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS")
    return tasks is not None and os.environ.get("SLURM_NTASKS", tasks) == tasks


def check_not_a_slurm_script() -> None:
    """Check that a process without a rank is not the script of a Slurm job that has several tasks.

    Raises:
        UserError: it is, so that one rank would train alone instead of all of them, or wait for the others for ever.
    """
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in os.environ and tasks != "1":
        raise UserError(
            f"environment: SLURM_NTASKS = {tasks}, but srun did not start this process, so it is the only one; start "
            "all ranks with `srun python ...`, or a single one on purpose with RANK=0 LOCAL_RANK=0 WORLD_SIZE=1"
        )


def hosts_of_step() -> list[str]:
    """Return the host of every task of this Slurm step; [] outside of one, or where Slurm does not tell."""
    if not os.environ.get("SLURM_DISTRIBUTION", "block").startswith("block"):
        return []
    return [host for host, count in _tasks_by_host().items() for _ in range(count)]


def on_one_host(world: int) -> bool:
    """Return whether all ranks are on this host, as far as the launcher tells."""
    local = first_set(LOCAL_SIZES)
    if local is not None:
        return local == str(world)
    if in_slurm_step():
        return os.environ.get("SLURM_STEP_NUM_NODES", "1") == "1"
    return _is_loopback(os.environ.get("MASTER_ADDR", LOOPBACK))


def find_first_rank(rank: int, world: int, by: str) -> None:
    """Set MASTER_ADDR and MASTER_PORT, if the launcher has not. `by` is the variable from which the rank was read.

    Raises:
        UserError: they are needed and cannot be found, or MASTER_ADDR is an address that other hosts cannot reach.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if world > 1 and by == "RANK" and not (address and port):
        missing = " and ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name))
        raise UserError(
            f"environment: RANK and WORLD_SIZE = {world} are set, but not {missing}; set MASTER_ADDR to the host of "
            f"rank 0 ({LOOPBACK} if all ranks are on one host) and MASTER_PORT to a free port there, the same for all"
        )
    if not (address and port):
        found = _find(rank, world, by, address)
        address, port = address or found[0], port or str(found[1])
    _check_address(address, on_one_host(world))
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=port)


def interface(nic: str, world: int) -> str | None:
    """Return the network interface of this rank: `nic`, or else the one that routes to rank 0; None on one host."""
    if on_one_host(world):
        return None
    found = nic or interface_towards(os.environ["MASTER_ADDR"])
    if found and not _is_loopback_interface(found):
        return found
    # This is rank 0's host, which finds its own name at a loopback address, as Debian's /etc/hosts has it.
    others = [host for host in _tasks_by_host() if host != os.environ["MASTER_ADDR"]]
    towards = (interface_towards(host) for host in [*others[:1], OUTSIDE])
    return next((name for name in towards if name and not _is_loopback_interface(name)), found)


def own_address() -> str:
    """Return the address of this host at which the other ranks reach it, after the ranks have joined."""
    found = psutil.net_if_addrs().get(os.environ.get("GLOO_SOCKET_IFNAME", ""), [])
    return next((one.address for one in found if one.family == socket.AF_INET), LOOPBACK)


def _find(rank: int, world: int, by: str, given: str | None) -> tuple[str, int]:
    """Return address and port of rank 0; of the address `given`, only the port is missing."""
    if world == 1:
        return LOOPBACK, 0  # any free port: no other rank joins
    # Deriving the port from the job keeps two jobs on a host apart.
    job = os.environ.get("PMIX_NAMESPACE") or ".".join(_values("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if on_one_host(world):
        return LOOPBACK, _port_of(job or str(starter()))
    if given and job:
        return given, _port_of(job)
    if by != SLURM_RANK and not (in_slurm_step() and first_set(LOCAL_SIZES) is None):
        return _ask_first_rank(rank, world)
    hosts, distribution = list(_tasks_by_host()), os.environ.get("SLURM_DISTRIBUTION", "block")
    if not hosts or distribution.startswith("arbitrary"):
        raise UserError(
            "environment: MASTER_ADDR is not set, and Slurm does not tell the host of task 0 (SLURM_STEP_NODELIST = "
            f"{os.environ.get('SLURM_STEP_NODELIST', '')!r}, SLURM_DISTRIBUTION = {distribution!r}); pass "
            "srun --export=ALL,MASTER_ADDR=HOST"
        )
    return hosts[0], _port_of(job)


def _tasks_by_host() -> dict[str, int]:
    """Return the hosts of this Slurm step, task 0's first, with their numbers of tasks; {} outside of a step."""
    nodes, tasks = os.environ.get("SLURM_STEP_NODELIST"), os.environ.get("SLURM_STEP_TASKS_PER_NODE")
    return from_slurm(nodes, tasks) if in_slurm_step() and nodes and tasks else {}


def _values(*names: str) -> list[str]:
    return [os.environ[name] for name in names if name in os.environ]


def _port_of(job: str) -> int:
    return 20000 + sum(job.encode()) * 7919 % 10000


def _check_address(address: str, one_host: bool) -> None:
    if _is_loopback(address) and not one_host:
        raise UserError(
            f"environment: MASTER_ADDR = {address} is every host itself, and the ranks are on several hosts; set it to "
            "the name or address of rank 0's host"
        )
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(
            f"environment: MASTER_ADDR = {address}, the host of rank 0, has no address on {socket.gethostname()} "
            f"({error.strerror}); set MASTER_ADDR to an address that all hosts reach"
        ) from None


def _ask_first_rank(rank: int, world: int) -> tuple[str, int]:
    """Ask rank 0 for its address and a free port over MPI.

    A process of its own talks to MPI, and ends as MPI expects: MPICH tells its mpirun that a rank has finished only
    when the interpreter shuts down, which a rank skips (`failing_together`), and mpirun would kill the other ranks.
    """
    command = [sys.executable, "-c", _MEETING]
    # MPI's connection to its mpirun is an open file.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, close_fds=False
    ) as meeting:
        assert meeting.stdin and meeting.stdout
        first = meeting.stdout.readline()
        if (size := int(first or 0)) not in (0, world):
            meeting.kill()
            raise UserError(
                f"environment: MASTER_ADDR is not set, and mpi4py sees {size} of {world} ranks; install the mpi4py of "
                "the MPI whose mpirun starts the job (pip install --no-binary mpi4py mpi4py), or pass MASTER_ADDR and "
                "MASTER_PORT"
            )
        if rank == 0 and (hosts := meeting.stdout.readline()):
            meeting.stdin.write(json.dumps(_own_address_and_port(json.loads(hosts))))
        meeting.stdin.close()
        answer = meeting.stdout.read()
    if meeting.returncode == _NO_MPI4PY:
        raise UserError(
            "environment: MASTER_ADDR is not set and mpi4py is missing, so ranks on several hosts cannot find rank 0; "
            "install the [mpi] extra or pass MASTER_ADDR and MASTER_PORT (mpirun -x MASTER_ADDR=host)"
        )
    if not answer:
        raise UserError(
            "environment: MASTER_ADDR is not set, and MPI did not connect the ranks (its messages are above); pass "
            "MASTER_ADDR and MASTER_PORT"
        )
    result: tuple[str, int] | str = json.loads(answer)
    if isinstance(result, str):
        raise UserError(result)
    return result[0], result[1]


def _own_address_and_port(hosts: Sequence[str]) -> tuple[str, int] | str:
    """Return an address of this host, and a free port; or the error, which all ranks are to raise."""
    try:
        return _own_address(hosts), free_port()
    except OSError as error:
        return (
            f"environment: MASTER_ADDR is not set, and rank 0's host {socket.gethostname()} has neither a route to the "
            f"others nor an address of its own name ({error.strerror}); set MASTER_ADDR to an address that all hosts "
            "reach"
        )


def _own_address(hosts: Sequence[str]) -> str:
    """Return the address of this host on the route to another one of `hosts`, or else on the default route."""
    others = [host for host in dict.fromkeys(hosts) if host != socket.gethostname()]
    for other in [*others, OUTSIDE]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((other, 9))  # no packet is sent
            except OSError:
                continue
            if not (own := str(probe.getsockname()[0])).startswith("127."):
                return own
    return _only_address() or socket.gethostbyname(socket.gethostname())


def _only_address() -> str | None:
    """Return this host's IPv4 address, if it has only one besides the loopback interface's."""
    every = (found for addresses in psutil.net_if_addrs().values() for found in addresses)
    own = {found.address for found in every if found.family == socket.AF_INET and not _is_loopback(found.address)}
    return own.pop() if len(own) == 1 else None


def _is_loopback(address: str) -> bool:
    return address in ("localhost", "::1") or address.startswith("127.")


def _is_loopback_interface(name: str) -> bool:
    return any(found.address == LOOPBACK for found in psutil.net_if_addrs().get(name, []))
