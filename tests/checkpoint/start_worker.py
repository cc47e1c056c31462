"""Worker for every rank: DeepSpeed's own PipelineEngine loads a converted checkpoint, and its weights are compared.

start_worker.py CHECKPOINT PP TP
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from typing import Any

import torch

from llama_ds.checkpoint.load_model import open_model
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.schema import (
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from llama_ds.layout.layout import Layout
from llama_ds.layout.weights import key_of, weight_of
from llama_ds.parallel import world
from llama_ds.training.engines.build import build_engine


def main() -> None:
    faulthandler.dump_traceback_later(240, exit=True)  # show where a hung rank waits
    folder, pp, tp = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    files = open_model(folder)
    rank_info = world.find_rank_info()
    with world.failing_together():
        world.join(rank_info)
        run = RunConfig(
            name="start",
            seed=99,
            output_dir="runs",
            model=files.model,
            data=DataConfig(__file__, files.seq_len, (SourceConfig("x", "x", 1.0),)),
            training=TrainingConfig(2, 2, 4 * files.seq_len),
            optimizer=OptimizerConfig(lr=1e-3),
            parallel=ParallelConfig(pp=pp, tp=tp, schedule="deepspeed"),
            deepspeed={"bf16": {"enabled": False}, "zero_optimization": {"stage": 1}},
        )
        layout = Layout(pp=pp, tp=tp, accumulation=2)
        engine: Any = build_engine(run, layout, deepspeed_config(run, layout, True), torch.device("cpu")).deepspeed
        path, _ = engine.load_checkpoint(
            os.path.dirname(folder), tag=os.path.basename(folder), load_module_only=True, load_optimizer_states=False
        )
        assert path, "DeepSpeed loaded nothing"
        rank = engine.grid.get_slice_parallel_rank()
        for name, parameter in engine.module.named_parameters():
            key = key_of(name)
            full, dim = files.tensors[key].whole(), weight_of(key[1]).cut
            wanted = full if dim is None else full.chunk(tp, dim)[rank]
            assert torch.equal(parameter[: len(wanted)], wanted) and not parameter[len(wanted) :].any(), name
        with open(f"{folder}.loaded-{rank_info.rank}", "w") as file:
            file.write(str(len(list(engine.module.named_parameters()))))


if __name__ == "__main__":
    main()
