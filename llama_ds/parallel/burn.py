"""Measures the matrix products and all-reduces of one of a host's slots for the preflight.

`llama_ds/launch/preflight/slots.py` starts it for each slot with one JSON argument.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llama_ds.job.heartbeat import interface_towards
from llama_ds.parallel.backend import on_cuda
from llama_ds.parallel.world import finish

GROUP_S = 20.0  # timeout for forming a group and for each of its all-reduces
MEASURED_S, MIN_REPEATS, MAX_REPEATS = 0.5, 3, 50  # all-reduces that are measured


def main() -> None:
    """Measure one slot, and print what it found."""
    print(json.dumps(measure(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # the normal exit would wait for a group whose peer failed


def measure(plan: dict[str, Any]) -> dict[str, Any]:
    """Return a slot's TFLOP/s and the bus bandwidth of each of its groups in GB/s, None for a group that failed."""
    cuda = on_cuda()
    device = torch.device("cuda", plan["slot"]) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    found: dict[str, Any] = {"tflops": multiply(device, plan["burn_s"]), "groups": {}}
    for group in plan["groups"]:
        try:
            found["groups"][group["name"]] = all_reduce(group, plan["slot"], device)
        except (RuntimeError, dist.DistError) as error:
            found["groups"][group["name"]] = None
            found["problem"] = f"{group['name']}: {str(error).splitlines()[0][:200]}"
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return found


def multiply(device: torch.device, seconds: float) -> float:
    """Return the TFLOP/s of square matrix products: bf16 on CUDA, fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    finish(device)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        for _ in range(10):
            a @ b
        finish(device)
        count += 10
    return 2 * size**3 * count / (time.perf_counter() - begin) / 1e12


def all_reduce(group: dict[str, Any], slot: int, device: torch.device) -> float:
    """Return the bus bandwidth of an all-reduce in GB/s: 2 (n - 1) / n times the bytes, for the shortest time.

    The shortest, because other work on a host delays single all-reduces, and a slow link delays each of them.
    """
    interface = interface_towards(group["master"])
    if interface:
        os.environ.update(GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=interface)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{group['master']}:{group['port']}",
        rank=group["first"] + slot,
        world_size=group["size"],
        timeout=timedelta(seconds=GROUP_S),
    )
    elements = (64 << 20 if device.type == "cuda" else 2 << 20) // 4
    data = torch.ones(elements, device=device)

    def measured() -> float:
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(data)
        finish(device)
        return time.perf_counter() - begin

    measured()  # the first also forms connections
    longest = torch.tensor([measured()], device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)  # all ranks repeat it equally often
    repeats = min(max(int(MEASURED_S / longest.item()), MIN_REPEATS), MAX_REPEATS)
    shortest = min(measured() for _ in range(repeats))
    return 2 * (group["size"] - 1) / group["size"] * elements * 4 / shortest / 1e9
