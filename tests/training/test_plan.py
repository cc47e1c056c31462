"""The plan that --dry-run prints: its numbers are correct."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import ModelConfig
from llama_ds.layout.flops import parameter_count
from llama_ds.layout.layout import resolve_layout
from llama_ds.layout.partition import boundaries, stage_parameters
from llama_ds.training.plan import describe, short

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def test_plan_of_65b_says_what_will_run() -> None:
    run = load_run(str(CONFIGS / "llama_65b.yaml"))
    layout = resolve_layout(run, 2048)
    lines = {line.strip() for line in describe(run, layout, deepspeed_config(run, layout, True)).splitlines()}
    assert {
        "parameters        65.3B = 65,285,660,672",
        "ranks         2,048 = pp 8 x dp 32 x tp 8, activations sharded along the sequence",
        "global batch  2,048 rows = 32 x 1 x 64 = 4,194,304 tokens",
        "7      10              12.8%           1.04B                10 none    1.17 GiB in 1 micro-batches",
        "pipeline      1f1b: bubble 9.9% of the step, for equal stages and free messages",
        "7              1.95     3.89       0.36       0.26     1.17              7.64   10 none",
        "steps         333,787",
        "step 1,999    lr 0.00015 (end of warm-up)",
        "writes to       runs/llama_65b",
        '"gradient_accumulation_steps": 64,',
    } <= lines
    assert "wikipedia      4.50%   63.0B   2.45    25.7B                 data/llama/shards/wikipedia" in lines


@pytest.mark.parametrize(("pp", "tp"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_stages_hold_the_whole_model(pp: int, tp: int) -> None:
    """TP shards add up to the model, except the norms, which every rank holds."""
    model = ModelConfig(512, 64, 96, 6, 8, 2, 8)
    held = stage_parameters(model, boundaries(model, 32, pp, None), tp)
    norms = (2 * 6 + 1) * 64
    assert tp * (sum(held) - norms) + norms == parameter_count(model)


@pytest.mark.parametrize(
    ("number", "text"),
    [(65_285_660_672, "65.3B"), (13_015_864_320, "13.0B"), (1.4e12, "1.40T"), (4_194_304, "4.19M"),
     (512_000, "512K"), (999_600_000, "1.00B"), (999_400, "999K"), (12, "12"), (0, "0")],
)  # fmt: skip
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text
