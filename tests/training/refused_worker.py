"""Builds engines with settings that DeepSpeed refuses, and one without a ZeRO section; prints what came of each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from llama_ds import log
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.errors import UserError
from llama_ds.parallel import world
from llama_ds.training.engines.build import build_engine
from tests.parallel.layout_cases import Case, micro_batches

GIVEN: tuple[dict[str, Any], ...] = (
    {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "float12"}},
    {"zero_optimization": {"stage": 2}, "gradient_predivide_factor": 2.0},
    {},
)


def main() -> None:
    log.setup(quiet=True)
    world.join(world.find_rank_info())
    for given in GIVEN:
        case = Case(zero=0, micro_batch=4)
        run = replace(case.run, deepspeed=given, deepspeed_path="ds.json")
        try:
            engine = build_engine(run, case.layout, deepspeed_config(run, case.layout, True), torch.device("cpu"))
        except UserError as error:
            print(error)
            continue
        engine.read(engine.train_step(micro_batches(case, 0), 1e-3))
        print("trains")


if __name__ == "__main__":
    main()
