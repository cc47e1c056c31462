"""The processes of a run: identity of this rank, rendezvous, small collectives, and coordinated failure."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from llama_ds.errors import UserError
from llama_ds.job.devices import VARIABLE as DEVICES
from llama_ds.job.devices import VISIBLE, decode
from llama_ds.job.requests import RANK_VARIABLES
from llama_ds.job.run_end import RunEnd
from llama_ds.log import logger
from llama_ds.parallel.backend import backend, check_own_device, device_index, on_cuda, use_device
from llama_ds.parallel.early_reads import reading
from llama_ds.parallel.environment import check_others, first_number
from llama_ds.parallel.first_rank import (
    LOCAL_SIZES,
    check_not_a_slurm_script,
    find_first_rank,
    hosts_of_step,
    in_slurm_step,
    interface,
)
from llama_ds.parallel.gathering import gather_objects, gather_rows
from llama_ds.parallel.joining import open_store
from llama_ds.shipped import as_typed

T = TypeVar("T")

# Variables in which launchers pass a process its rank; those of DeepSpeed and torchrun come first.
LAUNCHER_VARIABLES = {
    "RANK": RANK_VARIABLES,
    "WORLD_SIZE": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"),
    "LOCAL_RANK": ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
}
TIMEOUT = timedelta(minutes=30)

# Keys in the process group's store with which ranks agree on the one that reports a user error.
FAILURES, REPORTED = "llama_ds/failures", "llama_ds/reported"
BROKEN = "llama_ds/broken"  # number of ranks that ended with an error other than a user error
REPORT_TIMEOUT = timedelta(seconds=10)


@dataclass(frozen=True)
class RankInfo:
    """Identity of this process: its rank, the number of ranks, and its index on this host."""

    rank: int
    world: int
    local_rank: int


def find_rank_info() -> RankInfo:
    """Read this process's rank from the launcher's environment; without a launcher, the world is one rank.

    Raises:
        UserError: the launcher set only some of the variables, a value is not a number of its range, or this is the
            script of a Slurm job of several tasks.
    """
    check_others()
    first_number(LOCAL_SIZES, 1)
    ignored = () if in_slurm_step() else ("SLURM_",)
    found = {
        name: first_number(tuple(one for one in names if not one.startswith(ignored)), 1 if name == "WORLD_SIZE" else 0)
        for name, names in LAUNCHER_VARIABLES.items()
    }
    if found["RANK"] is None and found["WORLD_SIZE"] is None:
        check_not_a_slurm_script()
        return RankInfo(0, 1, 0)
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise UserError(
            f"environment: {' and '.join(missing)} not set but other launcher variables are; "
            "start with deepspeed, torchrun or mpirun, or set RANK, WORLD_SIZE and LOCAL_RANK together"
        )
    own = RankInfo(*(found[name] or 0 for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if own.rank >= own.world:
        raise UserError(
            f"environment: rank {own.rank} is not below the {own.world} ranks of the world; ranks count from 0"
        )
    return own


def launched_ranks() -> int:
    """Return the number of ranks that a launcher has started this process with, 1 without a launcher.

    Raises:
        UserError: the variable is no number.
    """
    names = LAUNCHER_VARIABLES["WORLD_SIZE"]
    return first_number(tuple(name for name in names if in_slurm_step() or not name.startswith("SLURM_")), 1) or 1


def join(rank_info: RankInfo, nic: str = "", hosts: Sequence[str] = ()) -> None:
    """Join the run's process group by `backend`, over `nic` or else the interface towards rank 0.

    `hosts` are the hosts of all ranks, to name those that are waited for. DeepSpeed adopts the group. It is created
    here, without a device id, because DeepSpeed's own call makes NCCL create a communicator eagerly for each of the
    hundreds of groups of a large grid.

    Raises:
        UserError: rank 0 cannot be found, ranks do not come within `TIMEOUT`, or NCCL would refuse this rank's GPU.
    """
    rank, size = rank_info.rank, rank_info.world
    devices = decode(os.environ.get(DEVICES, ""), rank)
    if devices is not None:  # the launcher set it to the host's first ones
        os.environ[VISIBLE] = devices
    by = next((name for name in LAUNCHER_VARIABLES["RANK"] if name in os.environ), "")
    find_first_rank(rank, size, by)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank_info.local_rank))
    if on_cuda():
        use_device(device_index(rank_info.local_rank))
    if own := interface(nic, size):  # otherwise gloo uses the interface of the host's name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", own)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", own)
    store = open_store(rank, size, rank_info.local_rank, TIMEOUT, hosts or hosts_of_step())
    dist.init_process_group(backend(), store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    check_own_device(store)


def check_mpi(rank_info: RankInfo) -> None:
    """Check that MPI reports the same rank and world size as its launcher.

    Raises:
        UserError: mpi4py is missing, or belongs to another MPI than the launcher, so that every process is alone.
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


def device() -> torch.device:
    """Return the device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda() else torch.device("cpu")


def device_memory(where: torch.device) -> int:
    """Return the bytes that this rank may use: its share of a CUDA device, or of the host's free memory."""
    ranks = first_number((*LOCAL_SIZES, "WORLD_SIZE"), 1) or 1
    if where.type == "cuda":
        sharing = -(-ranks // torch.cuda.device_count()) if backend() == "gloo" else 1
        return torch.cuda.get_device_properties(where).total_memory // sharing
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // ranks


def device_size(where: torch.device) -> int:
    """Return the bytes that no rank can exceed: the memory of a CUDA device, or all of the host's."""
    return device_memory(where) if where.type == "cuda" else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def finish(where: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def computes_bf16(where: torch.device) -> bool:
    """Return whether the device multiplies bf16 natively; emulation is several times slower than fp32."""
    if where.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return avx512 and bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def together(step: Callable[[], T]) -> T:
    """Run `step` on every rank; if it raises a user error on any rank, raise that error on all.

    Collective. Otherwise the ranks that succeed would wait for the failed ones until the timeout.
    """
    result, error = _tried(step)
    _raise_first(gather(error))
    return result  # type: ignore[return-value]


def gather_results(step: Callable[[], T]) -> list[T]:
    """Return the results of `step`, which must be picklable, on all ranks; a user error is raised as by `together`."""
    results, errors = zip(*gather(_tried(step)), strict=True)
    _raise_first(errors)
    return list(results)


def _tried(step: Callable[[], T]) -> tuple[T | None, str]:
    try:
        return step(), ""
    except UserError as mistake:
        return None, str(mistake)


def _raise_first(errors: Iterable[str]) -> None:
    if first := next(filter(None, errors), ""):
        raise UserError(first)


def gather_numbers(values: list[int], where: torch.device) -> np.ndarray:
    """Return the integers of all ranks: (world, len(values)). Collective; synchronises with the device."""
    own = torch.tensor(values, dtype=torch.int64, device=where)
    return gather_rows(own) if dist.is_initialized() else own.cpu().numpy()[None]


def gather(value: T) -> list[T]:
    """Return the values of all ranks, which must be picklable. Collective; for infrequent use."""
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    return [value] if alone else gather_objects(value, device())


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


def maximum_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` with the elementwise maximum over all ranks in it. Collective."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def total(values: list[float], where: torch.device) -> list[float]:
    """Return the elementwise sum over all ranks, in float64. Collective; synchronises with the device."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=where)
    dist.all_reduce(tensor)
    return tensor.tolist()


def start_maximum(value: int, where: torch.device) -> Callable[[], int]:
    """Start an all-reduce of an integer's maximum; the returned call waits for it alone and returns it. Collective."""
    if not dist.is_initialized():
        return lambda: value
    tensor = torch.full((1,), value, dtype=torch.int32, device=where)  # a copy from the host would wait for the device
    work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)

    def wait() -> int:
        with reading(where):
            work.wait()
            return int(tensor)

    return wait


def size_of(group: dist.ProcessGroup) -> int:
    """Return the number of ranks of a group."""
    return dist.get_world_size(group)


def start_sum(value: torch.Tensor, group: dist.ProcessGroup) -> Any:
    """Start to sum `value` over `group` in place; return what is to be waited for, None for one rank. Collective."""
    return dist.all_reduce(value, group=group, async_op=True) if dist.get_world_size(group) > 1 else None


def mean(value: torch.Tensor, group: dist.ProcessGroup) -> float:
    """Return the mean of a scalar over `group`. Collective; synchronises with the device."""
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return float(total) / dist.get_world_size(group)


def is_first() -> bool:
    """Return whether this is rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


@dataclass
class ProgramEnd:
    """How a rank's program ends if it does not fail."""

    code: int = 0


@contextmanager
def failing_together(
    tell: Callable[..., None] = lambda **_: None, close_outputs: Callable[[RunEnd], None] = lambda _: None
) -> Iterator[ProgramEnd]:
    """Turn an exception of this rank into a message and a non-zero exit, without waiting for the other ranks.

    A user error is printed once, whether one or all ranks raise it; ranks that fail because another has exited do not
    repeat it. Any other exception is printed with its traceback. The exit skips atexit handlers, in which a process
    group would hang once its peers have exited. A rank without an error runs to the end of its program and then skips
    the interpreter's shutdown (`_end_at_once`) with the code that it has set in the yielded object.

    `tell` is called first, with the failure's kind ("echo" if another rank failed before) and text, and
    `close_outputs` last.
    """
    end = ProgramEnd()
    try:
        yield end
    except UserError as error:
        message = as_typed(f"error: {error}")
        tell(what="failure", kind=error.kind, text=message, ranks=list(error.ranks))
        _report_once(message)
        close_outputs(RunEnd.FAILED)
        _leave(UserError.EXIT_CODE)
    except KeyboardInterrupt:
        close_outputs(RunEnd.INTERRUPTED)
        _leave(130)
    except Exception as error:
        code = report_failure(error, tell)
        close_outputs(RunEnd.FAILED)
        _leave(code)
    if dist.is_initialized():
        dist.destroy_process_group()
        atexit.register(_end_at_once, end)


def _report_once(message: str) -> None:
    """Print `message`, or wait until the first rank has: launchers kill the remaining ranks after an exit."""
    if not dist.is_initialized():
        print(message, file=sys.stderr)
        return
    store = distributed_c10d._get_default_store()
    with suppress(dist.DistError):  # rank 0 hosts the store and exits after a report
        if store.add(FAILURES, 1) == 1:
            print(message, file=sys.stderr, flush=True)
            store.set(REPORTED, "")
        else:
            store.wait([REPORTED], REPORT_TIMEOUT)


def report_failure(error: Exception, tell: Callable[..., None]) -> int:
    """Print and `tell` this rank's error, shortened if another rank failed first; return the exit code."""
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


def _end_at_once(end: ProgramEnd) -> NoReturn:
    """Exit before other atexit handlers: a native thread that runs during interpreter shutdown aborts the process."""
    _leave(1 if getattr(sys, "last_value", None) else end.code)  # set if an exception ended the program


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
