"""One rank of eight: scores requests and continues texts with an exported model under pp 2 x tp 2 x dp 2, sequence
parallelism and document masks, with dualpipe_v for four layers or more.

    python -m tests.evaluation.exported_ranks FOLDER ASKED OUT

ASKED holds pairs of context and continuation, and prompts; the first rank writes the outcomes to OUT. A folder without
a tokenizer is read by letters.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from typing import Any

import torch

from llama_ds import log
from llama_ds.checkpoint.load_model import open_model
from llama_ds.config import rules
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.evaluation.generation import GenerationRequest
from llama_ds.evaluation.requests import ScoringRequest
from llama_ds.evaluation.scoring import Scorer
from llama_ds.layout.layout import resolve_layout
from llama_ds.parallel import world
from llama_ds.training.engines.build import build_engine
from llama_ds.training.engines.scoring import EngineBackend
from llama_ds.training.evaluation_job import EvaluationSettings, evaluation_run
from llama_ds.training.held_weights import fill_weights
from tests.evaluation.letters import Letters

RANKS, ROWS = 8, 2


def main() -> None:
    folder, asked, out = sys.argv[1:]
    rank_info = world.find_rank_info()
    log.setup(quiet=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with open(asked) as file:
        pairs, prompts = json.load(file)
    with world.failing_together():
        world.join(rank_info)
        scorer = scorer_of(folder)
        found: dict[str, Any] = {"texts": [one.ids for one in scorer.generator.generate(continued(prompts))]}
        requests = [ScoringRequest(*pair) for pair in pairs]
        for name, longest in (("branched", scorer.backend.shape.longest_branched), ("packed", 1)):
            scorer.backend.shape = replace(scorer.backend.shape, longest_branched=longest)
            scores = scorer.log_likelihoods(requests)
            found[name] = [(score.log_likelihood, score.greedy) for score in scores]
        if rank_info.rank == 0:
            with open(out, "w") as file:
                json.dump(found, file)


def scorer_of(folder: str) -> Scorer:
    """Return a scorer of the model on the engine of this layout."""
    files = open_model(folder)
    tokenizer: Any = Tokenizer(files.tokenizer) if files.tokenizer else Letters()
    run = evaluation_run(files, tokenizer.path, "fp32", EvaluationSettings(rows=ROWS, pp=2, tp=2), RANKS)
    parallel = replace(run.parallel, sequence_parallel=True)
    if run.model.num_hidden_layers >= 4:
        parallel = replace(parallel, schedule="dualpipe_v", virtual_stages=2)
    training = replace(run.training, global_batch=4 * run.training.global_batch)  # as many as the schedule needs
    run = replace(run, data=replace(run.data, document_mask=True), training=training, parallel=parallel)
    rules.check(run)
    layout = resolve_layout(run, RANKS)
    assert (layout.pp, layout.tp, layout.dp) == (2, 2, 2)
    config = deepspeed_config(run, layout, bf16_native=True)
    engine: Any = build_engine(run, layout, config, torch.device("cpu"), tokenizer.marks, trains=False)
    fill_weights(engine.deepspeed, files.tensors, layout.tp, folder)
    return Scorer(EngineBackend(engine, run, layout, tokenizer.marks), tokenizer)


def continued(prompts: list[list[Any]]) -> list[GenerationRequest]:
    """Return greedy requests of [context, stop strings, number of tokens]."""
    return [GenerationRequest(context, tuple(stops), tokens) for context, stops, tokens in prompts]


if __name__ == "__main__":
    main()
