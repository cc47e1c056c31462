"""Ranks of a benchmark: starts them, waits, and kills them if one fails or the user interrupts; joins them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llama_ds import log
from llama_ds.child_processes import ended_like_ctrl_c, without_interrupts
from llama_ds.errors import UserError
from llama_ds.launch.namespaces import INTERFACE, Hosts
from llama_ds.machine import free_port

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
PORT = 29507


def check_links(rate_mbit: float | None, delay_ms: float) -> None:
    """Raise UserError for a latency of links without a bandwidth: ranks on loopback would not have it."""
    if delay_ms and rate_mbit is None:
        raise UserError(
            f"command line: --delay-ms {delay_ms:g} is of simulated links, which need --rate-mbit; add it, such as "
            "--rate-mbit 1000, or leave --delay-ms out"
        )


@contextmanager
def joined(kind: type[T]) -> Iterator[tuple[T, Path, int]]:
    """Join this process with the others of `start_ranks`; yield the request, its folder and the rank."""
    from llama_ds.parallel import world  # torch, which what starts the ranks does not need

    request = kind(**json.loads(Path(sys.argv[1]).read_text()))
    log.silence_libraries()
    log.setup(quiet=True)
    rank_info = world.find_rank_info()
    with world.failing_together():
        world.join(rank_info)
        yield request, Path(sys.argv[2]), rank_info.rank


def start_ranks(
    module: str,
    wanted: DataclassInstance,
    folder: Path,
    world: int,
    rate_mbit: float | None,
    delay_ms: float,
    node_ranks: int = 1,
) -> None:
    """Run `python -m module REQUEST.json FOLDER` on every rank, with `wanted` as the request.

    With `rate_mbit` every rank is a host; links between each `node_ranks` neighbours have no limit.

    Raises:
        UserError: a rank failed; the message has the end of its log.
    """
    request = folder / "request.json"
    request.write_text(json.dumps(asdict(wanted)))
    with ended_like_ctrl_c(), ExitStack() as stack:
        hosts = stack.enter_context(Hosts(world, rate_mbit, delay_ms, node_ranks)) if rate_mbit else None
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, processes)
        for rank, environment in enumerate(_environments(world, hosts)):
            command = [sys.executable, "-m", module, str(request), str(folder)]
            command = hosts.command(rank, command) if hosts else command
            log = stack.enter_context(open(folder / f"rank{rank}.log", "w"))
            with without_interrupts():
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            time.sleep(0.1)
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
    if failed:
        raise UserError(f"rank {failed[0]} failed:\n{(folder / f'rank{failed[0]}.log').read_text()[-3000:]}")


def _environments(world: int, hosts: Hosts | None) -> list[dict[str, str]]:
    """Return the environment of each rank, on its own simulated host or on this one."""
    common = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT))
    common |= {"WORLD_SIZE": str(world), "MASTER_PORT": str(PORT if hosts else free_port())}
    common |= {"MASTER_ADDR": hosts.address(0) if hosts else "127.0.0.1"}
    if hosts:
        common |= {"GLOO_SOCKET_IFNAME": INTERFACE}
    return [common | {"RANK": str(rank), "LOCAL_RANK": "0" if hosts else str(rank)} for rank in range(world)]


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        process.wait()
