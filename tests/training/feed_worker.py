"""One of four ranks: draws the batches of each scenario through a `Feed` and writes what it received."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from llama_ds.config.context_parallel import cp_sizes
from llama_ds.config.run_file import load_run
from llama_ds.data.stream import open_data
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout
from llama_ds.parallel import world
from llama_ds.training.feed import Feed

CLONE_NEWUTS = 0x04000000


def main() -> None:
    folder = Path(sys.argv[1])
    rank_info = world.find_rank_info()
    world.join(rank_info)
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUTS):  # gives this process its own host name
        raise OSError(ctypes.get_errno(), "unshare")
    for name, scenario in json.loads((folder / "scenarios.json").read_text()).items():
        socket.sethostname(scenario["hosts"][rank_info.rank])
        seen = draw(scenario, rank_info, folder)
        np.savez(folder / f"{name}.r{rank_info.rank}.npz", **seen)
        world.barrier()
    print("fine", flush=True)
    os._exit(0)  # after a failed scenario a rank still blocks in a broadcast


def draw(scenario: dict[str, Any], rank_info: world.RankInfo, folder: Path) -> dict[str, Any]:
    run = load_run(scenario["run_files"][rank_info.rank], scenario["overrides"])
    layout = resolve_layout(run, rank_info.world)
    engine: Any = SimpleNamespace(
        reads_data=scenario["reads"][rank_info.rank], dp_rank=scenario["dp_ranks"][rank_info.rank]
    )
    steps = range(*scenario["steps"])
    batches, labels, error, data = [], [], "", open_data(run)
    if layout.cp > 1:
        cp = SimpleNamespace(rank=layout.coords(rank_info.rank).cp, size=layout.cp, sizes=cp_sizes(run)[0])
        marks = data.sources.tokenizer.marks
        engine.context = SimpleNamespace(cp=cp, document_mask=run.data.document_mask, marks=marks)
    try:
        feed = Feed(run, layout, data, steps, engine, rank_info, torch.device("cpu"))
        for step in steps:
            feed.before_step(step)
            drawn = [next(feed) for _ in range(layout.accumulation)]
            batches.append([getattr(batch, "rows", batch) for batch in drawn])  # an empty array on a middle stage
            labels.append({getattr(batch, "labels", 0) for batch in drawn}.pop() * layout.accumulation * layout.dp)
            if step in scenario["spoil_after"] and rank_info.rank == 0:
                for shard in Path(scenario["spoil"]).glob("train-*.tar"):
                    shard.write_bytes(shard.read_bytes()[:600])
            if step in scenario["spoil_after"]:
                world.barrier()
        feed.close()
        reads = feed._reader is not None
    except UserError as mistake:
        error, reads = str(mistake), False
    bad = json.dumps(data.state.as_json()["bad"])
    return {"batches": np.array(batches), "labels": np.array(labels), "error": error, "reads": reads, "bad": bad}


if __name__ == "__main__":
    main()
