"""One rank: scores requests and continues texts on the engine of every given case between two steps; rank 0 writes
the outcomes as JSON.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from dataclasses import asdict, replace
from typing import Any

import torch

from llama_ds import log
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.document_marks import LLAMA_MARKS
from llama_ds.errors import UserError
from llama_ds.evaluation.scoring import Scorer
from llama_ds.parallel import world
from llama_ds.training.engines.build import build_engine
from llama_ds.training.engines.scoring import EngineBackend
from tests.evaluation.letters import TEXT, Letters, some_prompts, some_requests
from tests.parallel.layout_cases import SEQ_LEN, Case, micro_batches

LR = 1e-2
SHORT = 16  # tokens of a branched row, where longer requests are also scored in plain rows


def outcome(case: Case) -> dict[str, Any]:
    """Return scores and texts with the initial weights, and losses of two steps with scoring before, and without."""
    found: dict[str, Any] = {}
    if case.zero < 3 and case.sequence_parallel:
        found["extra bytes"] = world.gather([extra_bytes(case, trains) for trains in (True, False)])
    for evaluates in (False, True) if compares_training(case) else (True,):
        config = deepspeed_config(case.run, case.layout, bf16_native=True)
        engine = build_engine(case.run, case.layout, config, torch.device("cpu"))
        scorer = Scorer(EngineBackend(engine, case.run, case.layout, LLAMA_MARKS), Letters())  # type: ignore[arg-type]
        batches, losses = micro_batches(case, engine.dp_rank), []
        for step in range(2):
            if evaluates:
                scores = scorer.log_likelihoods(some_requests(20, SEQ_LEN))
                if step == 0:
                    found["scores"] = [asdict(score) for score in scores]
                    found["rolling"] = scorer.rolling_log_likelihoods([TEXT, TEXT[:20]])
                    found["generated"] = generated(scorer)
                    if case.cp > 1:
                        scorer.backend.shape = replace(scorer.backend.shape, longest_branched=SHORT)
                        plain = scorer.log_likelihoods(some_requests(20, SEQ_LEN))
                        found["plain"] = [asdict(score) for score in plain]
            losses.append(engine.read(engine.train_step(batches, LR)))
        found["with" if evaluates else "without"] = losses
        engine.deepspeed.destroy()
    return found


def extra_bytes(case: Case, trains: bool) -> float:
    """Return the bytes of all tensors of an engine beside its weights, as a multiple of theirs."""
    before = tensor_bytes()
    config = deepspeed_config(case.run, case.layout, bf16_native=True)
    engine = build_engine(case.run, case.layout, config, torch.device("cpu"), trains=trains)
    weights = sum(p.nbytes for p in engine.deepspeed.module.parameters())
    held = sum(size for address, size in tensor_bytes().items() if address not in before)
    engine.deepspeed.destroy()
    return held / weights - 1


def tensor_bytes() -> dict[int, int]:
    """Return the sizes of all memory that tensors hold, by address."""
    gc.collect()
    storages = [one.untyped_storage() for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def generated(scorer: Scorer) -> list[tuple[int, ...]] | str:
    """Return the ids of continuations, or the error of an engine that has none."""
    try:
        return [one.ids for one in scorer.generator.generate(some_prompts())]
    except UserError as error:
        return str(error)


def compares_training(case: Case) -> bool:
    """Return whether training without scoring is run too: one case of each engine that a forward could disturb."""
    return case.sequence_parallel or case.zero == 3


def main() -> None:
    cases_file, out = sys.argv[1:]
    rank_info = world.find_rank_info()
    log.setup(quiet=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with open(cases_file) as file:
        cases = [Case(**case) for case in json.load(file)]
    with world.failing_together():
        world.join(rank_info)
        outcomes = world.gather([outcome(case) for case in cases])
        assert all(one == outcomes[0] for one in outcomes), "every rank has every score"
        if rank_info.rank == 0:
            with open(out, "w") as file:
                json.dump(outcomes[0], file)


if __name__ == "__main__":
    main()
