"""One rank of a measurement of the machine; `llama_ds/launch/run_ranks.py` starts it on every slot.

Rank 0 writes the results of all ranks as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path.
sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch

from llama_ds import log
from llama_ds.benchmarks.machine import computing, layouts
from llama_ds.checkpoint.model_shape import read_models
from llama_ds.checkpoint.weights import DTYPES
from llama_ds.config.run_file import load_run
from llama_ds.errors import UserError
from llama_ds.log import logger
from llama_ds.machine import cpu_name
from llama_ds.model.cpu_products import choose_products
from llama_ds.parallel import sweep, world
from llama_ds.perf.plan.curves import OPERATIONS
from llama_ds.training.host_memory import keep_freed_memory


def main() -> None:
    """Run the requested measurement."""
    parser = argparse.ArgumentParser(fromfile_prefix_chars="@")
    parser.add_argument("request", help="JSON: what, out, slots, ...")
    parser.add_argument("--local_rank", type=int)
    request = json.loads(parser.parse_args().request)
    log.silence_libraries()
    rank_info = world.find_rank_info()
    log.setup(quiet=rank_info.rank != 0)
    with world.failing_together():
        world.join(rank_info, request["nic"])
        if world.device().type == "cpu":
            keep_freed_memory()  # as in training
            choose_products()
        read_models()
        found = MEASUREMENTS[request["what"]](request, rank_info, world.device())
        if rank_info.rank == 0:
            Path(request["out"]).write_text(json.dumps(found), encoding="utf-8")


def measure_computing(request: dict[str, Any], rank_info: world.RankInfo, device: torch.device) -> dict[str, Any]:
    """Measure on as many ranks of each node as can compute at full speed concurrently."""
    native = world.computes_bf16(device)
    dtype = request["dtype"] or ("bf16" if native else "fp32")
    sizes = computing.QUICK if request["quick"] else computing.CUDA if device.type == "cuda" else computing.CPU
    at_once = request["slots"] if device.type == "cuda" else min(request["slots"], os.cpu_count() or 1)
    run, own = load_run(request["run"]), None
    world.barrier()
    if rank_info.local_rank < at_once:
        own = computing.measure(run, sizes, device, DTYPES[dtype], logger.info)
    found = [one for one in world.gather_at_first((rank_info.rank, own)) if one[1]]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "host_computes": device.type == "cpu",
        "dtype": dtype,
        "at_once": at_once,
        "memory_bytes": world.device_memory(device),
        "ranks": dict(found),
    }


def measure_links(request: dict[str, Any], rank_info: world.RankInfo, device: torch.device) -> dict[str, Any]:
    """Measure collectives in every kind of group, and how much they slow down overlapped computation."""
    limit = request["max_bytes"] or (256 << 20 if device.type == "cuda" else 16 << 20)
    sizes = [size for i in range(0, 64, 2) if (size := request["min_bytes"] << i) <= limit]
    if not sizes:
        raise UserError(
            f"--min-bytes {request['min_bytes']} is more than the largest tensor of {limit}; give --max-bytes"
        )
    found = sweep.sweep(
        request["operations"] or OPERATIONS, request["slots"], sizes, request["seconds"], device, logger.info
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    contention = sweep.contention(sizes[-1], device, dtype) if rank_info.world > 1 else None
    return {"collectives": [asdict(one) for one in found], "contention": contention}


MEASUREMENTS = {"computing": measure_computing, "links": measure_links, "layouts": layouts.measure}

if __name__ == "__main__":
    main()
