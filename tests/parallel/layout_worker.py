"""One rank of a layout test: trains every given case on the real engines; rank 0 writes the histories as JSON."""

from __future__ import annotations

import gc
import json
import logging
import sys
from typing import Any

import torch

from llama_ds import log
from llama_ds.checkpoint.weights import DTYPES
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.layout.optimizer_states import MASTER
from llama_ds.layout.weights import key_of
from llama_ds.parallel import world
from llama_ds.parallel.optimizer_state import fragments
from llama_ds.training.engines.build import build_engine
from llama_ds.training.lr_schedule import learning_rate
from tests.parallel.layout_cases import STEPS, VALIDATION, Case, micro_batches, reference_model, step_batches


def train(case: Case) -> tuple[list[tuple[float, float]], float]:
    """Return loss and gradient norm of each step, and the validation loss after the last."""
    run = case.run
    engine = build_engine(run, case.layout, deepspeed_config(run, case.layout, bf16_native=True), torch.device("cpu"))
    assert gc.get_freeze_count() > 100_000, "DeepSpeed's collections of garbage walk all that is imported"
    if case.tp == 1:
        check_initial_weights(case, engine.deepspeed)
    batches = micro_batches(case, engine.dp_rank)
    history = []
    for step in range(case.steps):
        result = engine.train_step(batches, learning_rate(step, run.optimizer, STEPS))
        history.append(engine.read(result))
    if (case.dtype, case.zero, case.decoder_layer) == ("bf16", 1, "manual_backward"):
        # Straight into BF16_Optimizer's fp32 buffers: no matrix has a gradient in bf16.
        assert all(p.grad is None for n, p in engine.deepspeed.module.named_parameters() if "_proj" in n)
    batches = step_batches(case, engine.dp_rank, VALIDATION)
    validation = engine.evaluate(batches, len(batches))
    engine.deepspeed.destroy()
    return history, validation


def check_initial_weights(case: Case, engine: Any) -> None:
    """Check that the masters are bit for bit those of plain torch, rounded to the dtype of training."""
    plain = {key_of(name): weight for name, weight in reference_model(case).named_parameters()}
    for fragment in fragments(engine):
        part = plain[key_of(fragment.name)].detach().flatten()[fragment.start :][: fragment.numel]
        assert torch.equal(fragment.tensors[MASTER], part.to(DTYPES[case.dtype]).float()), fragment.name


def main() -> None:
    cases_file, out = sys.argv[1:]
    rank_info = world.find_rank_info()
    log.setup(quiet=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with open(cases_file) as file:
        cases = [Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in c.items()}) for c in json.load(file)]
    with world.failing_together():
        world.join(rank_info)
        histories = []
        for case in cases:
            histories.append(train(case))
            if rank_info.rank == 0:
                print(case.name, histories[-1][0][0], histories[-1][0][-1], flush=True)
        if rank_info.rank == 0:
            with open(out, "w") as file:
                json.dump(histories, file)


if __name__ == "__main__":
    main()
