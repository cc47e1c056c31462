"""One rank of the test of DeepSpeed's keys: saves, starts from and resumes under each; rank 0 writes what differs.

deepspeed_key_worker.py FOLDER OUT
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import groups

from llama_ds import log
from llama_ds.checkpoint.load_model import open_model
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.layout.optimizer_states import MASTER
from llama_ds.parallel import world
from llama_ds.parallel.optimizer_state import fragments
from llama_ds.parallel.temporary import dismantle
from llama_ds.training.checkpoints import Checkpoints
from llama_ds.training.engines import single_stage
from llama_ds.training.engines.build import build_engine
from tests.parallel.deepspeed_key_cases import KeyCase, key_cases
from tests.parallel.layout_cases import VALIDATION, micro_batches, step_batches

LEARNING_RATE, SAVED, LAST = 3e-3, 2, 3


def differences(key: KeyCase, folder: str, rank_info: world.RankInfo) -> list[str]:
    """Return what a run under a key computes otherwise once it is started from, or resumed. Collective."""
    run, layout, case = key.run(folder), key.layout, key.case
    config = deepspeed_config(run, layout, bf16_native=True)
    if config["zero_optimization"].get("offload_optimizer"):
        config["zero_force_ds_cpu_optimizer"] = False  # see `main`
    checkpoints = Checkpoints(run, layout, case.dtype, rank_info)
    assert checkpoints.choose() is None
    checkpoints.begin()

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's group, which a process may create once
    unbroken = build_engine(run, layout, config, torch.device("cpu"))
    initial = evaluated(unbroken, key)
    batches = micro_batches(case, unbroken.dp_rank)
    for _ in range(SAVED):
        unbroken.train_step(batches, LEARNING_RATE)
    checkpoints.save(unbroken.deepspeed, SAVED, {})
    saved = masters(unbroken.deepspeed, [MASTER])
    loss = evaluated(unbroken, key)
    assert loss < initial - 0.01, "the saved weights must differ from the initial ones"
    step = unbroken.read(unbroken.train_step(batches, LEARNING_RATE))
    ended = masters(unbroken.deepspeed)
    dismantle(unbroken.deepspeed)
    checkpoints.close()

    again = Checkpoints(run, layout, case.dtype, rank_info)
    chosen = again.choose()
    assert chosen
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    engine = build_engine(run, layout, config, torch.device("cpu"))
    evaluated(engine, key)  # whatever an engine keeps of its initial weights is there now
    again.start_from(engine.deepspeed, open_model(os.path.join(again.folder, chosen[0])).finest)
    found = {
        "start_from: masters": same(masters(engine.deepspeed, [MASTER]), saved),
        "start_from: loss": evaluated(engine, key) == loss,
    }
    assert again.load(engine.deepspeed, *chosen) == SAVED
    found["resume: loss of the saved weights"] = evaluated(engine, key) == loss
    result = engine.train_step(micro_batches(case, engine.dp_rank, SAVED), LEARNING_RATE)
    found["resume: loss and norm of the next step"] = engine.read(result) == step
    found["resume: masters and moments after it"] = same(masters(engine.deepspeed), ended)
    dismantle(engine.deepspeed)
    again.close()
    every = world.gather([name for name, equal in found.items() if not equal])
    return [f"rank {rank}: {name}" for rank, names in enumerate(every) for name in names]


def evaluated(engine: Any, key: KeyCase) -> float:
    """Return the loss of some rows. Collective."""
    batches = step_batches(key.case, engine.dp_rank, VALIDATION)[:1]
    return engine.evaluate(batches, 1)


def masters(engine: Any, kinds: list[str] | None = None) -> dict[tuple[str, int, str], torch.Tensor]:
    """Return copies of this rank's masters and moments, or of some kinds only."""
    return {
        (part.name, part.start, kind): tensor.clone()
        for part in fragments(engine)
        for kind, tensor in part.tensors.items()
        if kinds is None or kind in kinds
    }


def same(found: dict[Any, torch.Tensor], wanted: dict[Any, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def main() -> None:
    folder, out = sys.argv[1:]
    rank_info = world.find_rank_info()
    log.setup(quiet=True)
    log.silence_libraries()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed's CPU Adam would be compiled first, for a minute. What it computes is not the subject: under offload the
    # masters and moments live in the same buffers with torch's.
    offloaded, build = single_stage.build_optimizer, {}
    single_stage.build_optimizer = lambda groups, settings, config: offloaded(groups, settings, build)
    found = {}
    with world.failing_together():
        world.join(rank_info)
        for number, case in enumerate(key_cases()):
            found[case.name] = differences(case, str(Path(folder, str(number))), rank_info)
            if found[case.name]:
                for other, key in enumerate(case.alone()):
                    found[key.name] = differences(key, str(Path(folder, f"{number}_{other}")), rank_info)
        if rank_info.rank == 0:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
