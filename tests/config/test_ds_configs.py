"""The run files of ds_configs/: each loads, fits its ranks, and describes the model that it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.row_stages import stage_runs
from llama_ds.config.run_file import load_run
from llama_ds.launch.hostfile import parse_hostfile
from llama_ds.layout.flops import parameter_count
from llama_ds.layout.layout import resolve_layout
from llama_ds.perf.plan import hardware
from llama_ds.perf.plan.estimate import estimate

REPO = Path(__file__).resolve().parents[2]

# name: (ranks it is for, exact parameters). The papers say 6.7B, 13.0B, 32.5B, 65.2B, 70B and 8B.
RUNS = {
    "quickstart": (4, 6_450_432),
    "small_1gpu": (1, 134_105_856),
    "llama_7b": (256, 6_738_415_616),
    "llama_13b": (256, 13_015_864_320),
    "llama_33b": (256, 32_528_943_616),
    "llama_65b": (2048, 65_285_660_672),
    "llama_65b_zb_v": (2048, 65_285_660_672),
    "llama2_70b": (2048, 68_976_648_192),
    "llama3_8b": (256, 8_030_261_248),
    "llama3_8b_128k": (256, 8_030_261_248),
    "llama_65b_32k": (2048, 65_285_660_672),
}


def test_every_run_file_is_listed() -> None:
    assert {path.stem for path in (REPO / "ds_configs").glob("*.yaml")} == RUNS.keys()


@pytest.mark.parametrize("name", RUNS)
def test_run_file_resolves_on_its_ranks(name: str) -> None:
    world, parameters = RUNS[name]
    run = load_run(str(REPO / "ds_configs" / f"{name}.yaml"))
    config = deepspeed_config(run, resolve_layout(run, world), bf16_native=True)
    assert run.name == name
    assert parameter_count(run.model) == parameters
    assert config["bf16"]["enabled"] and config["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["llama_7b", "llama_13b", "small_1gpu"])
def test_uncut_models_also_take_zero_2_and_3(name: str, stage: int) -> None:
    run = load_run(str(REPO / "ds_configs" / f"{name}.yaml"), [f"deepspeed=zero{stage}_bf16.json"])
    config = deepspeed_config(run, resolve_layout(run, RUNS[name][0]), bf16_native=True)
    assert config["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("name", ["llama_7b", "llama_13b", "llama_33b", "llama_65b"])
def test_llama_reads_the_papers_batches_and_mixture(name: str) -> None:
    """arXiv 2302.13971, tables 1 and 2."""
    run = load_run(str(REPO / "ds_configs" / f"{name}.yaml"))
    assert run.training.global_batch * run.data.seq_len == 4_194_304
    assert [source.weight for source in run.data.sources] == [0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02]
    large = name in ("llama_33b", "llama_65b")
    assert run.training.tokens == (1_400_000_000_000 if large else 1_000_000_000_000)
    assert run.optimizer.lr == (1.5e-4 if large else 3e-4)
    epochs = [1.10, 1.06, 0.64, 2.45, 2.23, 1.06, 1.03] if large else [None] * 7
    assert [source.epochs for source in run.data.sources] == epochs


@pytest.mark.parametrize(("name", "ranks"), [("local", 2), ("2x8", 16), ("32x8", 256), ("256x8", 2048)])
def test_hostfile_counts_its_ranks(name: str, ranks: int) -> None:
    assert sum(parse_hostfile(str(REPO / "hostfiles" / name)).values()) == ranks


@pytest.mark.parametrize("name", ["llama3_8b_128k", "llama_65b_32k"])
def test_long_rows_fit_80_gib_on_their_ranks(name: str) -> None:
    """In every stage, with the least recompute that fits."""
    run = load_run(str(REPO / "ds_configs" / f"{name}.yaml"))
    a100 = hardware.load("a100-80gb")
    for stage in stage_runs(run):
        found = estimate(stage, RUNS[name][0], a100)
        assert found.fits and stage.training.global_batch * stage.data.seq_len == 4_194_304


def test_the_fast_65b_is_the_papers_in_another_layout() -> None:
    paper, fast = (load_run(str(REPO / f"ds_configs/{name}.yaml")) for name in ("llama_65b", "llama_65b_zb_v"))
    assert replace(fast, name=paper.name, path=paper.path, parallel=paper.parallel) == paper
    a100 = hardware.load("a100-80gb")
    found = estimate(fast, 2048, a100)
    assert found.fits and found.step.seconds * 1.35 < estimate(paper, 2048, a100).step.seconds


def test_llama_3_continues_as_published() -> None:
    """meta-llama/Llama-3.1-8B, config.json: rope_theta and rope_scaling; arXiv 2407.21783, section 3.4.2."""
    run = load_run(str(REPO / "ds_configs/llama3_8b_128k.yaml"))
    assert run.model.rope_theta == 500_000 and run.model.rope_scaling
    assert run.model.rope_scaling.parameters() == {
        "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert [stage.data.seq_len for stage in stage_runs(run)][::4] == [8192, 131_072]
    before = load_run(str(REPO / "ds_configs/llama3_8b.yaml")).model
    assert replace(run.model, rope_scaling=None) == before
