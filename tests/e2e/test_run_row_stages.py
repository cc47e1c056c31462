"""A pipelined run with stages of longer rows, in one start or in several, with context parallelism in the last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import TRAIN, forked, succeed
from test_run_resume import assert_same_bits
from tiny_run import GLOBAL_BATCH, SEQ_LEN, STEPS, Corpus, Run

from llama_ds.checkpoint.store import tag_of
from llama_ds.config.row_stages import stage_runs
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import ComputeConfig, ParallelConfig
from llama_ds.data.building.build import build_source
from llama_ds.data.stream import open_data
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.evaluation.evaluate import prepare
from llama_ds.evaluation.follow import result_lines
from llama_ds.evaluation.one_process import evaluate_folder
from llama_ds.evaluation.suite import find_tasks
from llama_ds.model.llama import Llama, layer_context
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.tensor_parallel import SingleRank
from llama_ds.training.device_batches import ids_and_labels
from llama_ds.training.lr_schedule import learning_rate

LONG = 2 * SEQ_LEN
TOKENS = GLOBAL_BATCH * SEQ_LEN
STAGES = [{"seq_len": SEQ_LEN, "until_step": 3}, {"seq_len": LONG, "cp": 2, "cp_method": "ring"}]
RANKS = 4  # two stages of the pipeline; dp 2, then cp 2


@pytest.fixture(scope="module")
def changes(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Changes to the tiny run: the stages, and sources built for both lengths."""
    root, inputs = tmp_path_factory.mktemp("lengths"), corpus.shards.parent
    (root / f"shards_{SEQ_LEN}").symlink_to(corpus.shards)
    sources = []
    for name, pattern, weight in (("code", "code", 0.75), ("prose", "prose.jsonl", 0.25)):
        build_source(
            *(name, str(inputs / pattern), str(corpus.tokenizer), str(root / f"shards_{LONG}"), LONG, 0.2),
            rows_per_shard=32,
            document_chars=1500,
        )
        sources.append({"name": name, "path": f"{root}/shards_{{seq_len}}/{name}", "weight": weight})
    found = {"data.stages": STAGES, "data.sources": sources, "data.document_mask": True}
    return found | {"parallel.pp": 2, "parallel.schedule": "zb_h1"}


def plain_losses(file: Path) -> list[float]:
    """Return the losses of the same steps in plain torch on one rank."""
    run, losses, tp = load_run(str(file)), [], SingleRank()
    plain = replace(
        stage_runs(run)[-1], parallel=ParallelConfig(), compute=ComputeConfig(attention_backend="reference")
    )
    marks = Tokenizer(run.data.tokenizer).marks
    model = Llama(layer_context(plain, tp, "cpu", torch.float32, marks), NextTokenLoss(tp))
    settings = run.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)
    for step in range(STEPS):
        data = open_data(run, step=step)
        loss = model(*ids_and_labels(data.read(data.order.rows_of(step)), torch.device("cpu")))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings, STEPS)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_a_run_stopped_in_each_of_its_stages_equals_one_that_was_not(
    changes: dict[str, Any], make_run: Callable[..., Run]
) -> None:
    """Losses are those of plain torch to 1e-5 (measured: 2e-7), and of both runs to the bit.

    Ranks that follow the run evaluate the checkpoints of both lengths.
    """
    whole, parts = make_run("whole", changes), make_run("parts", changes)
    output = succeed(forked(RANKS, TRAIN, whole.file), whole.log)
    assert "step 3 ends a stage of data.stages" in output and f"resumed at step 3 of {STEPS}" in output
    assert f"changed since step_00000003: data.seq_len {SEQ_LEN} -> {LONG}" in output
    for options, resumed in ((["checkpoint.stop_at=2"], 0), (["checkpoint.stop_at=5"], 2), ([], 5)):
        output = succeed(forked(RANKS, TRAIN, parts.file, *options), parts.log)
        assert not resumed or f"resumed at step {resumed} of {STEPS}" in output
    assert whole.losses == pytest.approx(plain_losses(whole.file), rel=1e-5)
    assert parts.losses == whole.losses and len(whole.losses) == STEPS
    assert parts.validation_loss == whole.validation_loss
    assert_same_bits(parts.newest, whole.newest)
    steps = [line for line in whole.metrics if "loss" in line]
    assert [line["tokens"] for line in steps] == [TOKENS * step for step in range(1, STEPS + 1)]
    read = [line for line in whole.metrics if "tokens/code" in line][-1]
    assert read["tokens/code"] + read["tokens/prose"] == TOKENS * 3  # since rows are of this length
    words = ("--tasks", "mini_copy", "--limit", "4", "--follow")
    output = succeed(forked(RANKS, "tools/evaluate.py", parts.dir, *words), parts.log)
    lines = result_lines(str(parts.dir / "tasks.jsonl"))
    evaluated = {line["step"]: line["tasks_share/mini_copy"] for line in lines}
    assert len(evaluated) == len(lines) and min(evaluated) <= 3 and max(evaluated) == STEPS
    works = prepare(find_tasks(["mini_copy"]), "unused", limit=4)
    for step, share in evaluated.items():  # 1e-5: layouts differ in the order of sums in fp32
        found = evaluate_folder(str(parts.dir / "checkpoints" / tag_of(step)), works, None, None, 4)
        assert share == pytest.approx(found["tasks"][0]["probability"], rel=1e-5)
