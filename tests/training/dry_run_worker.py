"""A real rank on gloo; a ledger records its collectives, messages and memory, which the dry run must predict."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from llama_ds import log
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.run_file import load_run
from llama_ds.layout.layout import resolve_layout
from llama_ds.layout.optimizer_states import states_of
from llama_ds.parallel import world
from llama_ds.parallel.dry_run.holdings import sort_holdings
from llama_ds.parallel.dry_run.ledger import Ledger
from llama_ds.training.engines.build import build_engine


def record(name: str, run_file: str, overrides: list[str], folder: Path, rank_info: world.RankInfo) -> None:
    run = load_run(run_file, overrides)
    layout = resolve_layout(run, rank_info.world)
    config = deepspeed_config(run, layout, bf16_native=False)
    ledger = Ledger()
    with ExitStack() as stack:
        stack.enter_context(ledger)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(ledger.saved, lambda tensor: tensor))
        engine = build_engine(run, layout, config, torch.device("cpu"))
        sort_holdings(engine.deepspeed, ledger, states_of(run.optimizer))
        building, held = ledger.calls, dict(ledger.now)
        ledger.restart()
        engine.trace.start()
        shape = (layout.accumulation, layout.micro_batch, run.data.seq_len + 1)
        rows = np.random.default_rng(engine.dp_rank).integers(0, run.model.vocab_size, shape)
        engine.read(engine.train_step(iter(rows), run.optimizer.lr))
    world.barrier()
    engine.trace.write(str(folder / name), rank_info.rank)
    found = {"building": building, "step": ledger.calls, "held": held, "matrices": ledger.most_matrices}
    (folder / name / f"calls{rank_info.rank}.json").write_text(json.dumps(found))
    engine.deepspeed.destroy()


def main() -> None:
    folder, run_file, *cases = sys.argv[1:]
    rank_info = world.find_rank_info()
    log.setup(quiet=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with world.failing_together():
        world.join(rank_info)
        for name, overrides in map(json.loads, cases):
            record(name, run_file, overrides, Path(folder), rank_info)


if __name__ == "__main__":
    main()
