"""A run with stages of longer and longer rows: in one start or in several, with context parallelism in the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from launching import TRAIN, forked, succeed
from test_run_resume import assert_same_bits
from tiny_run import GLOBAL_BATCH, SEQ_LEN, STEPS, Corpus, Run

from llama_ds.data.building.build import build_source

LONG = 2 * SEQ_LEN
TOKENS = GLOBAL_BATCH * SEQ_LEN
STAGES = [{"seq_len": SEQ_LEN, "until_step": 3}, {"seq_len": LONG, "cp": 2}]


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
    return {"data.stages": STAGES, "data.sources": sources}


@pytest.mark.slow
def test_a_run_stopped_in_each_of_its_stages_equals_one_that_was_not(
    changes: dict[str, Any], make_run: Callable[..., Run]
) -> None:
    whole, parts = make_run("whole", changes), make_run("parts", changes)
    output = succeed(forked(2, TRAIN, whole.file), whole.log)
    assert "step 3 ends a stage of data.stages" in output and f"resumed at step 3 of {STEPS}" in output
    assert f"changed since step_00000003: data.seq_len {SEQ_LEN} -> {LONG}" in output
    for options, resumed in ((["checkpoint.stop_at=2"], 0), (["checkpoint.stop_at=5"], 2), ([], 5)):
        output = succeed(forked(2, TRAIN, parts.file, *options), parts.log)
        assert not resumed or f"resumed at step {resumed} of {STEPS}" in output
    assert parts.losses == whole.losses and len(whole.losses) == STEPS
    assert parts.validation_loss == whole.validation_loss
    assert_same_bits(parts.newest, whole.newest)
    steps = [line for line in whole.metrics if "loss" in line]
    assert [line["tokens"] for line in steps] == [TOKENS * step for step in range(1, STEPS + 1)]
    read = [line for line in whole.metrics if "tokens/code" in line][-1]
    assert read["tokens/code"] + read["tokens/prose"] == TOKENS * 3  # since rows are of this length
