"""The arithmetic of a layout, and the numbers its errors propose."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ds.config.numbers import divisors
from llama_ds.config.run_file import load_run
from llama_ds.errors import UserError, listed
from llama_ds.layout.layout import Layout, resolve_layout

COUNT = " (micro-batches are training.global_batch / (dp * parallel.micro_batch))"
RUN = str(Path(__file__).resolve().parents[2] / "ds_configs" / "llama_65b.yaml")


def test_llama_65b_on_2048_ranks() -> None:
    assert resolve_layout(load_run(RUN), 2048) == Layout(pp=8, dp=32, tp=8, micro_batch=1, accumulation=64)


@pytest.mark.parametrize(
    ("world", "overrides", "rule"),
    [
        (2000, [], "world size 2000 is not a multiple of parallel.pp 8 * parallel.tp 8 = 64; "
         "start 1920, 1984 or 2048 ranks, or change parallel.pp or parallel.tp"),
        (1, [], "world size 1 is not a multiple of parallel.pp 8 * parallel.tp 8 = 64; "
         "start 64, 128 or 192 ranks, or change parallel.pp or parallel.tp"),
        (2048, ["training.global_batch=2000"], "training.global_batch = 2000 is not a multiple of "
         "dp 32 = world 2048 / (pp 8 * tp 8); use 1984 or 2016"),
        (2048, ["parallel.micro_batch=6"], "parallel.micro_batch = 6 does not divide 2048 / dp 32 = 64; "
         "use 1, 2, 4, 8, 16, 32 or 64"),
        (2048, ["parallel.schedule=interleaved", "parallel.virtual_stages=2", "parallel.micro_batch=16"],
         "parallel.schedule = interleaved: 4 micro-batches are not a multiple of pp = 8; use 8" + COUNT),
        (2048, ["parallel.schedule=dualpipe_v", "parallel.virtual_stages=2", "parallel.micro_batch=8"],
         "parallel.schedule = dualpipe_v: 8 micro-batches are fewer than 2 * pp = 16; use 16 or more" + COUNT),
        (2048, ["parallel.schedule=zb_h1", "parallel.virtual_stages=2"], "parallel.schedule = zb_h1: virtual_stages = "
         "2 is for schedule interleaved, dualpipe_v, zb_v, v_half or v_min; use 1" + COUNT),
        (2048, ["parallel.schedule=zb_v", "parallel.virtual_stages=2", "parallel.pass_times=[10, 12, 8]"],
         "parallel.schedule = zb_v: pass_times: 3 entries; use 4, the times of forward, input backward, weight "
         "backward and a message, or 49, three for each of 16 stages and the message" + COUNT),
        (2048, ["parallel.schedule=interleaved"], "parallel.schedule = interleaved: virtual_stages = 1 is one stage on "
         "each rank; use 2 or more, or schedule 1f1b" + COUNT),
        (2048, ["logging.trace_step=1", "logging.profile_ranks=[0, 2048]"],
         "logging.profile_ranks: 2048 is not one of the 2048 ranks; use 0 to 2047"),
    ],
)  # fmt: skip
def test_indivisible_numbers_are_told_with_those_that_would_do(world: int, overrides: list[str], rule: str) -> None:
    with pytest.raises(UserError) as error:
        resolve_layout(load_run(RUN, overrides), world)
    assert str(error.value) == f"{RUN}: {rule}"


def test_words() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert (listed([1]), listed([1, 2]), listed([1, 2, 3])) == ("1", "1 or 2", "1, 2 or 3")
