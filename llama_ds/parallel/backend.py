"""Backend of a run's process groups, and the CUDA device of a rank: NCCL takes one rank on each, gloo any number."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist

from llama_ds.errors import UserError
from llama_ds.job.devices import BACKEND

_FIX = f"start fewer ranks on the host, or let ranks share GPUs, to try a layout, by {BACKEND}=gloo"


def on_cuda() -> bool:
    """Return whether this run computes on CUDA; DeepSpeed's variable DS_ACCELERATOR=cpu disables it."""
    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


def backend() -> str:
    """Return "nccl" on CUDA unless ranks share devices, "gloo" elsewhere."""
    return "nccl" if on_cuda() and BACKEND not in os.environ else "gloo"


def device_index(local_rank: int) -> int:
    """Return the index of this rank's device among those that its process sees.

    A process that sees a single one uses it: Slurm's --gpus-per-task shows each task its own.

    Raises:
        UserError: the host has fewer devices than ranks, and they are not shared.
    """
    count = torch.cuda.device_count()
    if local_rank >= count > 1 and backend() == "nccl":
        raise UserError(
            f"environment: rank {local_rank} of {socket.gethostname()} has no GPU, because there are {count}, and NCCL "
            f"takes one rank on each; {_FIX}"
        )
    return local_rank % count


def use_device(index: int) -> None:
    """Compute on this device, in DeepSpeed too, which takes its index for the rank's on the host."""
    torch.cuda.set_device(index)
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):  # it demands that both agree
        if name in os.environ:
            os.environ[name] = str(index)


def check_own_device(store: dist.Store) -> None:
    """Refuse a device that another rank has if this process sees a single one: NCCL would, at the first collective.

    Raises:
        UserError: another rank has it.
    """
    if on_cuda() and backend() == "nccl" and torch.cuda.device_count() == 1:
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        if store.add(f"llama_ds/device/{uuid}", 1) > 1:
            raise UserError(
                f"environment: several ranks of {socket.gethostname()} have the same GPU (UUID {uuid}), and NCCL takes "
                f"one rank on each; {_FIX}"
            )
