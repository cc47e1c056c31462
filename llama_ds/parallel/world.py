"""The processes of a run: who this rank is, how it joins the others, and how all of them fail together."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from llama_ds.errors import UserError
from llama_ds.job.heartbeat import interface_towards
from llama_ds.log import logger

T = TypeVar("T")

# Names under which launchers tell a process its place, in DeepSpeed's and torchrun's words first.
LAUNCHER_VARIABLES = {
    "RANK": ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"),
    "WORLD_SIZE": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"),
    "LOCAL_RANK": ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
}
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
TIMEOUT = timedelta(minutes=30)

# Keys of the process group's store by which ranks agree on who reports a user error.
FAILURES, REPORTED = "llama_ds/failures", "llama_ds/reported"
BROKEN = "llama_ds/broken"  # how many ranks have ended by an error that is not the user's
REPORT_TIMEOUT = timedelta(seconds=10)


@dataclass(frozen=True)
class RankInfo:
    """Where this process stands: its rank, the number of ranks and its index on this host."""

    rank: int
    world: int
    local_rank: int


def find_place() -> RankInfo:
    """Read this process's place from the launcher's environment; alone when no launcher set one.

    Raises:
        UserError: when a launcher set only part of it.
    """
    found = {name: _first_set(names) for name, names in LAUNCHER_VARIABLES.items()}
    if found["RANK"] is None and found["WORLD_SIZE"] is None:
        return RankInfo(0, 1, 0)
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise UserError(
            f"environment: {' and '.join(missing)} not set but other launcher variables are; "
            "start with deepspeed, torchrun or mpirun, or set RANK, WORLD_SIZE and LOCAL_RANK together"
        )
    return RankInfo(*(int(found[name] or 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def _first_set(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if name in os.environ), None)


def join(rank_info: RankInfo, nic: str = "") -> None:
    """Join the run's process group: NCCL on CUDA, gloo elsewhere, over `nic` or else the interface towards rank 0.

    DeepSpeed adopts the group. It is made here, without a device id, because DeepSpeed's own call makes NCCL build
    a communicator eagerly for each of the hundreds of groups of a large grid.
    """
    os.environ.update(RANK=str(rank_info.rank), WORLD_SIZE=str(rank_info.world), LOCAL_RANK=str(rank_info.local_rank))
    _find_master(rank_info)
    interface = None if _on_one_host() else nic or interface_towards(os.environ["MASTER_ADDR"])
    if interface:  # gloo would take the one that the host's name leads to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    if on_cuda():
        torch.cuda.set_device(rank_info.local_rank)
    dist.init_process_group("nccl" if on_cuda() else "gloo", timeout=TIMEOUT)


def _find_master(rank_info: RankInfo) -> None:
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = "127.0.0.1" if _on_one_host() else _first_mpi_host()
    if "MASTER_PORT" not in os.environ and rank_info.world == 1:
        os.environ["MASTER_PORT"] = "0"  # any free one: nobody else comes
    if "MASTER_PORT" not in os.environ:
        # Under mpirun nobody hands out a port; one derived from the job keeps two jobs on a host apart.
        job = os.environ.get("PMIX_NAMESPACE") or os.environ.get("SLURM_JOB_ID") or str(os.getppid())
        os.environ["MASTER_PORT"] = str(20000 + sum(job.encode()) * 7919 % 10000)


def _on_one_host() -> bool:
    local = _first_set(_LOCAL_SIZES)
    return local is None or local == os.environ["WORLD_SIZE"]


def _first_mpi_host() -> str:
    """Ask rank 0 for its address over MPI, as DeepSpeed's own MPI discovery does."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError(
            "environment: MASTER_ADDR is not set and mpi4py is missing, so ranks on several hosts cannot find rank 0; "
            "install the [mpi] extra or pass MASTER_ADDR (mpirun -x MASTER_ADDR=host)"
        ) from None
    import socket

    address = MPI.COMM_WORLD.bcast(socket.gethostbyname(socket.gethostname()), root=0)
    MPI.Finalize()  # this process ends without atexit handlers, which mpirun would take for a crash
    return address


def check_mpi(rank_info: RankInfo) -> None:
    """Check that MPI itself knows of as many ranks as its launcher said, and of this one as the same.

    Raises:
        UserError: mpi4py is missing, or of another MPI than the launcher, which makes every process a world of its own.
    """
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError(
            "mpi4py is missing, and the job's launcher is an MPI's; install the [mpi] extra, or use --launcher pdsh"
        ) from None
    found = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    MPI.Finalize()
    if found != (rank_info.rank, rank_info.world):
        raise UserError(
            f"MPI: mpi4py says rank {found[0]} of {found[1]}, the launcher rank {rank_info.rank} of {rank_info.world}; "
            "install the mpi4py of the MPI whose mpirun starts the job (pip install --no-binary mpi4py mpi4py)"
        )


def on_cuda() -> bool:
    """Tell whether this run computes on CUDA; DeepSpeed's own variable DS_ACCELERATOR=cpu says no."""
    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


def device() -> torch.device:
    """Return the device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda() else torch.device("cpu")


def device_memory(where: torch.device) -> int:
    """Return the bytes that this rank may use: all of a CUDA device, on a CPU its share of what the host has free."""
    if where.type == "cuda":
        return torch.cuda.get_device_properties(where).total_memory
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // int(_first_set((*_LOCAL_SIZES, "WORLD_SIZE")) or 1)


def finish(where: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def computes_bf16(where: torch.device) -> bool:
    """Tell whether the device multiplies bf16 natively; emulated, it is several times slower than fp32."""
    if where.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return avx512 and bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def together(step: Callable[[], T]) -> T:
    """Run `step` on every rank; when it fails with a user error on any, raise that error on all.

    Collective. Without it the ranks that succeeded would wait for the others until the time-out.
    """
    error: UserError | None = None
    result: T | None = None
    try:
        result = step()
    except UserError as mistake:
        error = mistake
    first = next((message for message in gather(str(error) if error else None) if message), None)
    error = UserError(first) if first else None
    if error:
        raise error
    return result  # type: ignore[return-value]


def gather_numbers(values: list[int], where: torch.device) -> np.ndarray:
    """Return the integers of all ranks: (world, len(values)). Collective; synchronises with the device."""
    own = torch.tensor(values, dtype=torch.int64, device=where)
    if not dist.is_initialized():
        return own.cpu().numpy()[None]
    every = own.new_empty(dist.get_world_size() * len(values))
    dist.all_gather_into_tensor(every, own)
    return every.view(-1, len(values)).cpu().numpy()


def gather(value: T) -> list[T]:
    """Return the value of every rank, any that can be pickled. Collective; for what happens rarely."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    every: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def gather_at_first(value: T) -> list[T]:
    """Return every rank's `value` on rank 0, an empty list on the others. Collective."""
    if not dist.is_initialized():
        return [value]
    every: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, every or None)
    return every


def maximum(values: list[float], where: torch.device) -> list[float]:
    """Return the elementwise maximum over all ranks. Collective; synchronises with the device."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64 if where.type == "cpu" else torch.float32, device=where)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def start_maximum(value: int, where: torch.device) -> Callable[[], int]:
    """Begin to agree on the maximum of an integer over all ranks; the returned call waits and gives it. Collective."""
    tensor = torch.tensor([value], dtype=torch.int32, device=where)
    work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True) if dist.is_initialized() else None

    def wait() -> int:
        if work:
            work.wait()
        return int(tensor)

    return wait


def mean(value: torch.Tensor, group: dist.ProcessGroup) -> float:
    """Return the mean of a scalar over `group`. Collective; synchronises with the device."""
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return float(total) / dist.get_world_size(group)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def failing_together(tell: Callable[..., None] = lambda **_: None) -> Iterator[None]:
    """Turn an exception of this rank into a message and a non-zero exit, without waiting for the other ranks' work.

    A user error, whether all ranks raise it or one, is printed once; ranks that fail because another has left do not
    add to it. Anything else is this rank's own and is printed with its traceback. The exit skips atexit handlers: a
    process group whose peers are gone would hang in them. A rank that is done goes on to the end of its program, and
    ends there without the interpreter's shutdown (`_end_at_once`).

    `tell` hears of the failure first: its kind ("echo" where another rank's was first) and text.
    """
    try:
        yield
    except UserError as error:
        tell(what="failure", kind=error.kind, text=f"error: {error}")
        _report_once(f"error: {error}")
        _leave(UserError.EXIT_CODE)
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        _leave(_report_own(error, tell))
    if dist.is_initialized():
        dist.destroy_process_group()
        atexit.register(_end_at_once)


def _report_once(message: str) -> None:
    """Print `message`, or wait until the rank that was first has: launchers kill those that are still there."""
    if not dist.is_initialized():
        print(message, file=sys.stderr)
        return
    store = distributed_c10d._get_default_store()
    with suppress(dist.DistError):  # rank 0 holds the store and leaves it after a report
        if store.add(FAILURES, 1) == 1:
            print(message, file=sys.stderr, flush=True)
            store.set(REPORTED, "")
        else:
            store.wait([REPORTED], REPORT_TIMEOUT)


def _report_own(error: Exception, tell: Callable[..., None]) -> int:
    """Print what went wrong on this rank, unless it is the echo of another's failure; return the exit code."""
    if not dist.is_initialized():
        tell(what="failure", kind="failure", text=traceback.format_exc())
        logger.error("%s", traceback.format_exc())
        return 1
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        store = distributed_c10d._get_default_store()
        if store.check([REPORTED]):
            return UserError.EXIT_CODE
        if store.add(BROKEN, 1) > 1:
            tell(what="failure", kind="echo", text=str(error))
            logger.error("rank %d of %d ends after another failed (%s)", rank, world, str(error).partition("\n")[0])
            return 1
    except dist.DistError:
        tell(what="failure", kind="echo", text=str(error))
        logger.error("rank %d of %d: rank 0 has ended (%s)", rank, world, str(error).partition("\n")[0])
        return 1
    tell(what="failure", kind="failure", text=traceback.format_exc())
    logger.error("rank %d of %d failed:\n%s", rank, world, traceback.format_exc())
    return 1


def _end_at_once() -> NoReturn:
    """Be the first atexit handler: a native thread still running while the interpreter is taken down is an abort."""
    _leave(1 if getattr(sys, "last_value", None) else 0)  # it is there where an exception has ended the program


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
