"""One rank: trains some steps under each given case, saving and loading between them; rank 0 writes the history."""

from __future__ import annotations

import json
import logging
import sys

import torch
import torch.distributed as dist

from llama_ds import log
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.parallel import world
from llama_ds.training.engine import build_engine
from llama_ds.training.schedule import learning_rate
from tests.parallel.layout_cases import STEPS, Case, micro_batches


def main() -> None:
    cases_file, folder, out = sys.argv[1:]
    place = world.find_place()
    log.setup(quiet=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with open(cases_file) as file:
        cases = [Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in c.items()}) for c in json.load(file)]
    share = STEPS // len(cases)
    history: list[tuple[float, float]] = []
    with world.failing_together():
        world.join(place)
        for turn, case in enumerate(cases):
            run = case.run
            config = deepspeed_config(run, case.layout, bf16_native=True)
            engine = build_engine(run, case.layout, config, torch.device("cpu"))
            first = engine.load(folder, f"turn{turn - 1}") if turn else 0
            assert first == turn * share
            batches = micro_batches(case, engine.dp_rank, first)
            for step in range(first, first + share):
                history.append(engine.read(engine.train_step(batches, learning_rate(step, run.optimizer, STEPS))))
            engine.save(folder, f"turn{turn}")
            dist.barrier()
            engine.deepspeed.destroy()
        if place.rank == 0:
            with open(out, "w") as file:
                json.dump(history, file)


if __name__ == "__main__":
    main()
