"""Started on every rank: save a model of large layers, or load it and print the memory that loading took.

reshard_memory_worker.py FOLDER TP save|load
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_ds import log
from llama_ds.benchmarks.checkpoint.worker import peak_memory
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.schema import ModelConfig
from llama_ds.layout.flops import layer_parameters
from llama_ds.layout.optimizer_states import ADAMW
from llama_ds.parallel import world
from llama_ds.parallel.optimizer_state import begin_moments, fragments
from llama_ds.training.checkpoints import Checkpoints
from llama_ds.training.engines.build import build_engine
from tests.parallel.layout_cases import Case

MODEL = ModelConfig(96, 768, 2112, 8, 8, 4, 96)
LAYER_BYTES = 12 * layer_parameters(MODEL)  # master and two moments


def main() -> None:
    folder, tp, action = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    log.setup(quiet=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    rank_info = world.find_rank_info()
    with world.failing_together():
        world.join(rank_info)
        case = Case(1, tp, 1)
        run = replace(case.run, model=MODEL, output_dir=folder)
        run = replace(run, data=replace(run.data, tokenizer=__file__))
        engine: Any = build_engine(run, case.layout, deepspeed_config(run, case.layout, True), torch.device("cpu"))
        begin_moments(engine.deepspeed, 3, ADAMW)
        checkpoints = Checkpoints(run, case.layout, "fp32", rank_info)
        if action == "save":
            for fragment in fragments(engine.deepspeed):
                fragment.tensors["exp_avg"].fill_(fragment.start + 1)
            checkpoints.begin()
            checkpoints.save(engine.deepspeed, 3, {})
            checkpoints.close()
            return
        for fragment in fragments(engine.deepspeed):
            fragment.tensors["exp_avg"].fill_(0)
            fragment.tensors["exp_avg_sq"].fill_(1)
        before = peak_memory(reset=True)
        chosen = checkpoints.choose()
        assert chosen
        checkpoints.load(engine.deepspeed, *chosen)
        assert all((f.tensors["exp_avg"] > 0).all() for f in fragments(engine.deepspeed))
        Path(folder, "growth").write_text(str(peak_memory() - before))


if __name__ == "__main__":
    main()
