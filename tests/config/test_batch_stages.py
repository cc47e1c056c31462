"""Stages of larger and larger batches: the rows of each step, what is refused before a launch, and how runs resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llama_ds.checkpoint.manifest import Description
from llama_ds.checkpoint.store import check_resumable
from llama_ds.config.batch_stages import Batches, batches_of, tokens_before
from llama_ds.config.row_stages import at_stage, first_step, stage_runs, stage_steps
from llama_ds.config.run_file import dump, load_resolved, load_run, resolved
from llama_ds.config.schema import RunConfig
from llama_ds.data.order import BadShard, Order, Segment
from llama_ds.data.skips import Skip
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout
from llama_ds.training.plan import describe_stages

FILE = str(Path(__file__).resolve().parents[2] / "ds_configs/small_1gpu.yaml")
SIZES = ["data.seq_len=512", "training.global_batch=64", "training.steps=100", "parallel.micro_batch=2"]
SIZES += ["optimizer.warmup_steps=1", "evaluation.rows=64"]
STAGES = "training.batch_stages=[{global_batch: 16, until_step: 10}, {global_batch: 32, until_step: 40}]"
ROWS = [16] * 10 + [32] * 30 + [64] * 60


def load(*overrides: str) -> RunConfig:
    return load_run(FILE, [*SIZES, *overrides])


def test_each_step_has_the_rows_of_its_stage(tmp_path: Path) -> None:
    run = load(STAGES)
    batches = batches_of(run.training)
    assert [batches.of(step) for step in range(100)] == ROWS
    assert [batches.first_row(step) for step in range(101)] == [sum(ROWS[:step]) for step in range(101)]
    numbers = [step for step, rows in enumerate(ROWS) for _ in range(rows)]
    assert [batches.step_of(row) for row in range(len(numbers))] == numbers
    assert [batches.steps_for(n) for n in (0, 1, 16, 17, 160, 161)] == [0, 1, 1, 2, 10, 11]
    assert run.training.tokens == sum(ROWS) * 512 == tokens_before(run, 100)
    assert [stage.training.global_batch for stage in stage_runs(run)] == [16, 32, 64]
    assert [resolve_layout(stage, 4).accumulation for stage in stage_runs(run)] == [2, 4, 8]
    for stage in stage_runs(run):  # any of them leads to all others, as the run of a checkpoint does
        assert [at_stage(stage, step).training.global_batch for step in (0, 9, 10, 39, 40, 999)] == [
            *(16, 16, 32, 32, 64, 64)
        ]
        (tmp_path / "run.yaml").write_text(dump(stage))
        assert load_resolved(str(tmp_path / "run.yaml")).training == stage.training
    assert [stage_steps(run, step) for step in (0, 10, 99)] == [range(10), range(10, 40), range(40, 100)]
    assert [first_step(stage) for stage in stage_runs(run)] == [0, 10, 40]


def test_a_stage_or_a_run_can_be_as_long_as_some_tokens() -> None:
    by_tokens = "training.batch_stages=[{global_batch: 16, until_tokens: 80_000}, {global_batch: 32, until_step: 40}]"
    assert load(by_tokens).training == load(STAGES).training  # 9.8 steps of 8,192
    run = load_run(
        FILE, [*(one for one in SIZES if "steps=100" not in one), STAGES, f"training.tokens={sum(ROWS) * 512 - 1}"]
    )
    assert (run.training.steps, run.training.tokens) == (100, sum(ROWS) * 512 - 1)


def test_the_plan_has_a_line_for_each_stage() -> None:
    run = load(STAGES, "model.mup={base_width: 128, base_head_dim: 16}")
    text = describe_stages(run, 4, {"bf16": {"enabled": True}})
    assert "stages of training.batch_stages (the plan is that of steps of 64 rows, which need the most memory)" in text
    assert "base width 128; hidden matrices: initial weights x 0.4" in text
    assert "tokens" in text and f"{sum(ROWS) * 512:,}" in text
    assert [line.split()[:5] for line in text.splitlines()[2:5]] == [
        ["0", "to", "10", "512", "16"],
        ["10", "to", "40", "512", "32"],
        ["40", "to", "100", "512", "64"],
    ]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["{global_batch: 16, until_step: 100}"], r"stages.0 ends at step 100, not before the end of the run, .*= 100"),
        (["{global_batch: 16}, {global_batch: 64}"], r"stages.0 has no end after step 0, where it begins"),
        (["{global_batch: 16, until_step: 9}, {global_batch: 32, until_step: 9}"], r"1 ends at step 9, not after 9"),
        (["{global_batch: 16, until_step: 9}, {global_batch: 32, until_tokens: 9}"], r"1 ends at step \d, not after"),
        (["{global_batch: 16, until_step: 9}, {global_batch: 8, until_step: 12}"], r"batch = 8 is not above the 16 of"),
        (["{global_batch: 80, until_step: 9}"], r"training.global_batch = 64 is not above the 80 of .*stages.0"),
        (["{global_batch: 16, until_step: 9, until_tokens: 9}"], r"until_step = 9 and until_tokens = 9; keep one"),
        (["{global_batch: 0, until_step: 9}"], r"training.batch_stages.0.global_batch = 0 is not positive"),
        (
            ["{global_batch: 16, until_step: 9}", "training.global_batch=0"],
            r": training.global_batch = 0 is not positive",
        ),
        (["{rows: 8, until_step: 9}"], r"training.batch_stages.0.rows is not a known key"),
        (["{global_batch: 16, until_step: 9}, {global_batch: 48}"], r"= 64 is not the 48 of the last entry"),
        (["{global_batch: 16, until_step: 9}", "checkpoint.save=false"], r"every stage but the first resumes from the"),
        (
            ["{global_batch: 16, until_step: 9}", "data.stages=[{seq_len: 512, until_step: 5}, {seq_len: 512}]"],
            r"training.batch_stages and data.stages both cut the run into stages; leave one out",
        ),
    ],
)
def test_stages_that_cannot_be_trained_are_refused(options: list[str], rule: str) -> None:
    stages, *others = options
    with pytest.raises(UserError, match=rule) as error:
        load(f"training.batch_stages=[{stages}]", *others)
    assert "\n" not in str(error.value)


def test_a_batch_that_ranks_do_not_divide_is_refused_before_the_launch() -> None:
    with pytest.raises(UserError) as error:
        resolve_layout(load(STAGES), 16)
    said = "parallel.micro_batch = 2 does not divide 16 / dp 16 = 1"
    assert said in str(error.value)
    assert str(error.value).endswith("(in the stage of training.batch_stages with 16 rows)")


def test_a_run_resumes_with_the_batches_that_it_has_trained() -> None:
    def recorded(run: RunConfig, step: int) -> Description:
        data = resolved(run)
        return Description(step, 0, 1, "fp32", {}, data, {}, (step,), {}, [])  # type: ignore[arg-type]

    whole, staged = load(), load(STAGES)
    found = recorded(at_stage(staged, 20), 20)
    check_resumable("tag", found, resolved(at_stage(staged, 0)))
    later = "training.batch_stages=[{global_batch: 16, until_step: 10}, {global_batch: 32, until_step: 70}]"
    check_resumable("tag", found, resolved(load(later)))
    for other in (whole, load(STAGES.replace("until_step: 10", "until_step: 11"))):
        with pytest.raises(UserError, match=r"was trained with training.global_batch 16 for 10 steps; 32 for 10 steps"):
            check_resumable("tag", found, resolved(other))
    check_resumable("tag", recorded(whole, 20), resolved(load(
        "training.batch_stages=[{global_batch: 64, until_step: 20}]", "training.global_batch=128"
    )))  # fmt: skip
    with pytest.raises(UserError) as error:
        check_resumable("tag", recorded(whole, 20), resolved(load("training.global_batch=128")))
    assert "to continue with 128, set training.batch_stages: [{global_batch: 64, until_step: 20}]" in str(error.value)


def test_stages_move_the_boundaries_of_steps_and_no_row() -> None:
    """With a change of the mixture, a damaged shard and rows that are skipped, at the same rows of the run."""
    weights, extents = {"a": 0.7, "b": 0.3}, {"a": (400,), "b": (300,)}
    batches = Batches((4, 12), (0, 6))  # steps 6 and 10 of it begin at rows 24 and 72, 6 and 18 of batches of 4

    def order(rows: Batches | int, at: int, bad: int, skip: Skip) -> Order:
        segments = [Segment(0, weights, extents), Segment(at, {"a": 0.2, "b": 0.8}, extents)]
        return Order(7, rows, dict.fromkeys(weights, 20), segments, [BadShard(bad, "a", 2)], [skip])

    steady, staged = order(4, 9, 6, Skip(18, 6)), order(batches, 7, 6, Skip(10, 2))
    assert all(map(np.array_equal, steady.rows(0, 200), staged.rows(0, 200)))
    for step in range(20):
        for found, wanted in zip(
            staged.rows_of(step), steady.rows(batches.first_row(step), batches.of(step)), strict=True
        ):
            assert np.array_equal(found, wanted)
        parts = [staged.at(step, rank, 2) for rank in range(2)]
        assert [len(part.row) for part in parts] == [batches.of(step) // 2] * 2
    assert staged.consumed(12) == steady.consumed(24)
