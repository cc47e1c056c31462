"""Runs on every rank: trains the cases of one world size, each from the checkpoint of the previous one.

resume_worker.py CASES FOLDER FIRST_TURN STEPS_A_TURN OUT
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_ds import log
from llama_ds.checkpoint.manifest import Description, read_tensors
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.schema import CheckpointConfig
from llama_ds.layout.optimizer_states import MASTER
from llama_ds.layout.weights import key_of, weight_of
from llama_ds.parallel import world
from llama_ds.parallel.optimizer_state import adam_steps, fragments
from llama_ds.parallel.temporary import dismantle
from llama_ds.training.checkpoints import Checkpoints
from llama_ds.training.engines.build import build_engine
from llama_ds.training.lr_schedule import learning_rate
from tests.parallel.engine_series import engines_in_turn
from tests.parallel.layout_cases import STEPS, Case, micro_batches
from tests.parallel.layout_worker import padded_shard


def main() -> None:
    cases_file, folder, first_turn, share, out = sys.argv[1:]
    rank_info = world.find_rank_info()
    log.setup(quiet=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with open(cases_file) as file:
        cases = [Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in c.items()}) for c in json.load(file)]
    history: list[tuple[float, float]] = []
    with world.failing_together(), engines_in_turn() as series:
        world.join(rank_info)
        for turn, case in enumerate(cases, int(first_turn)):
            with series.engine():
                history += take_turn(case, Path(folder), turn * int(share), int(share), rank_info)
        if rank_info.rank == 0:
            Path(out).write_text(json.dumps(history))


def take_turn(case: Case, folder: Path, first: int, steps: int, rank_info: world.RankInfo) -> list[tuple[float, float]]:
    """Train `steps` steps from `first` on, and save."""
    run = replace(case.run, output_dir=str(folder), checkpoint=CheckpointConfig(strict=True))
    run = replace(run, data=replace(run.data, tokenizer=__file__))  # any file
    config = deepspeed_config(run, case.layout, bf16_native=True)
    engine = build_engine(run, case.layout, config, torch.device("cpu"))
    checkpoints = Checkpoints(run, case.layout, case.dtype, rank_info)
    checkpoints.products = engine.context.products
    chosen = checkpoints.choose()
    assert bool(chosen) == bool(first)
    if chosen:
        assert checkpoints.load(engine.deepspeed, *chosen) == first
        check_loaded(engine.deepspeed, Path(checkpoints.folder) / chosen[0], chosen[1], case)
        assert checkpoints.products.state() == chosen[1].fp8_history
        assert bool(chosen[1].fp8_history) == (case.fp8 == "delayed")
    checkpoints.begin()
    batches = micro_batches(case, engine.dp_rank, first)
    random = torch.get_rng_state()
    history = [
        engine.read(engine.train_step(batches, learning_rate(step, run.optimizer, STEPS)))
        for step in range(first, first + steps)
    ]
    assert torch.equal(torch.get_rng_state(), random), (
        "a step draws random numbers: a checkpoint must carry their state"
    )
    checkpoints.save(engine.deepspeed, first + steps, {})
    checkpoints.close()
    dismantle(engine.deepspeed)
    return history


def check_loaded(engine: Any, tag: Path, found: Description, case: Case) -> None:
    """Check every loaded element bit for bit against a plain shard: chunk the full tensor, flatten, take the range."""
    rank = engine.mpu.get_tensor_model_parallel_rank()
    wholes = read_tensors(str(tag), found, found.states.all_kinds())

    def own_part(kind: str, name: str) -> torch.Tensor:
        key = key_of(name)
        whole, dim = wholes[kind][key].whole(), weight_of(key[1]).cut
        return whole if dim is None else padded_shard(whole, dim, case.tp, rank)

    elements = 0
    for fragment in fragments(engine):
        for kind, tensor in fragment.tensors.items():
            wanted = own_part(kind, fragment.name).reshape(-1)[fragment.start : fragment.start + fragment.numel]
            assert torch.equal(tensor, wanted), f"{fragment.name} {kind}"
            elements += tensor.numel()
    assert elements > len(wholes) * 10_000 // case.world
    for parameter, name in engine.param_names.items():
        if not hasattr(parameter, "ds_id"):
            assert torch.equal(parameter, own_part(MASTER, name).to(parameter.dtype)), name
    assert adam_steps(engine) == found.step


if __name__ == "__main__":
    main()
