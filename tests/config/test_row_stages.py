"""Stages of longer and longer rows: the run of each stage, what is refused before a launch, and how runs resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ds.checkpoint.manifest import Description
from llama_ds.checkpoint.store import check_resumable
from llama_ds.config.row_stages import at_stage, length_begins, stage_runs, stage_steps
from llama_ds.config.run_file import dump, load_resolved, load_run, resolved
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout

FILE = str(Path(__file__).resolve().parents[2] / "ds_configs/small_1gpu.yaml")
PATHS = "data.sources=[{name: a, path: 'shards_{seq_len}/a', weight: 1}]"
SIZES = ["data.seq_len=512", "training.global_batch=64", "training.steps=100", "evaluation.rows=64", PATHS]
SIZES += ["optimizer.warmup_steps=1"]
STAGES = "data.stages=[{seq_len: 512, until_step: 40, micro_batch: 4}, {seq_len: 1024, until_step: 60}, "
STAGES += "{seq_len: 4096, cp: 4, micro_batch: 1}]"


def load(*overrides: str) -> RunConfig:
    return load_run(FILE, [*SIZES, "parallel.micro_batch=2", *overrides])


def sizes(run: RunConfig) -> tuple[int, ...]:
    parallel = run.parallel
    return run.data.seq_len, run.training.global_batch, run.evaluation.rows, parallel.cp, parallel.micro_batch


def test_every_stage_has_the_tokens_of_a_step(tmp_path: Path) -> None:
    run = load(STAGES)
    assert [sizes(stage) for stage in stage_runs(run)] == [
        (512, 64, 64, 1, 4),
        (1024, 32, 32, 1, 2),
        (4096, 8, 8, 4, 1),
    ]
    assert run == at_stage(run, 0) and run.training.tokens == 100 * 64 * 512
    for stage in stage_runs(run):  # any of them leads to all others, as the run of a checkpoint does
        assert [sizes(at_stage(stage, step)) for step in (39, 40, 59, 60, 1000)] == [
            sizes(stage_runs(run)[i]) for i in (0, 1, 1, 2, 2)
        ]
        (tmp_path / "run.yaml").write_text(dump(stage))
        assert sizes(load_resolved(str(tmp_path / "run.yaml"))) == sizes(stage)
    assert [stage_steps(run, step) for step in (0, 40, 99)] == [range(40), range(40, 60), range(60, 100)]
    assert length_begins(run, 45) == 40
    assert at_stage(load(), 7) == load()


@pytest.mark.parametrize(
    ("stages", "options", "rule"),
    [
        (
            "[{seq_len: 512, until_step: 40}, {seq_len: 768}]",
            [],
            r"data.stages.1.seq_len = 768 does not divide the 32,768 tokens of training.global_batch = 64 rows of 512, "
            r"which all stages share; use 512 or 1024, or",
        ),
        (
            "[{seq_len: 512, until_step: 40}, {seq_len: 1024}]",
            ["evaluation.rows=65"],
            r"does not divide the 33,280 tokens of evaluation.rows = 65 rows",
        ),
        ("[{seq_len: 512, until_step: 100}, {seq_len: 1024}]", [], r"until_step = 100 is not between 0, .* = 100"),
        ("[{seq_len: 512}, {seq_len: 1024}]", [], r"data.stages.0.until_step is missing; set it"),
        ("[{seq_len: 512, until_step: 9}]", [], r"data.stages.0.until_step is set, but the last stage ends with the"),
        ("[{seq_len: 512, until_step: 9}, {seq_len: 256}]", [], r"seq_len = 256 is shorter than the 512 of the stage"),
        (
            "[{seq_len: 256, until_step: 9}, {seq_len: 512}]",
            [],
            r"data.seq_len.* = 512 is not the 256 of the first stage",
        ),
        (
            "[{seq_len: 512, until_step: 9}, {seq_len: 1024}]",
            [PATHS.replace("_{seq_len}", "")],
            r"names one folder for rows of all lengths in data.stages; write {seq_len}",
        ),
        ("[{seq_len: 512, until_step: 9}, {seq_len: 1024}]", ["checkpoint.save=false"], r"set checkpoint.save: true"),
        (
            "[{seq_len: 512, until_step: 9}, {seq_len: 1024, cp: 5, cp_method: ring}]",
            [],
            r"data.seq_len = 1024 is not a multiple of 10",
        ),
    ],
)
def test_bad_stages_are_refused_with_numbers_that_would_do(stages: str, options: list[str], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        load(f"data.stages={stages}", *options)


def test_the_ranks_of_every_stage_are_checked() -> None:
    assert resolve_layout(load(STAGES), 8).micro_batch == 4
    with pytest.raises(UserError, match=r"world size 6 is not a multiple of .*parallel.cp 4 .*with rows of 4096\)"):
        resolve_layout(load(STAGES, "data.stages.0.micro_batch=1", "data.stages.1.micro_batch=1", "evaluation.rows=72",
                            "training.global_batch=96", "data.stages.0.cp=2"), 6)  # fmt: skip


def test_a_run_resumes_with_longer_rows_where_its_stages_say_so() -> None:
    def resume(then: RunConfig, step: int, now: RunConfig) -> None:
        found = Description(
            step=step, tokens=0, zero_stage=1, dtype="fp32", layout={}, run=resolved(then), data={},
            optimizer_steps=step, rng={}, rewinds=[], bos_id=1, eos_id=2, hf_config={},
        )  # fmt: skip
        check_resumable("folder", found, resolved(now))

    whole, staged = load(), load(STAGES)
    for step in (10, 40):
        resume(whole, step, staged)
    resume(at_stage(staged, 50), 60, staged)
    resume(at_stage(staged, 70), 75, staged)
    longer = load("data.seq_len=1024", "training.global_batch=32", "evaluation.rows=32")
    advice = r"keep data.seq_len: 512 and set data.stages: \[{seq_len: 512, until_step: 40}, {seq_len: 1024}\]"
    with pytest.raises(UserError, match=rf"trained with data.seq_len 512, not 1024; use the same run file.*{advice}"):
        resume(whole, 40, longer)
    with pytest.raises(UserError, match=r"data.seq_len 512 for 41 steps, not 512 for 40 steps; 1024 for 1 steps"):
        resume(whole, 41, staged)
    with pytest.raises(UserError, match=r"trained with training.global_batch 64, not 128"):
        resume(whole, 10, load(STAGES, "training.global_batch=128"))
