"""The arithmetic of a layout, and the numbers its errors propose."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ds.config.layout import Layout, divisors, listed, resolve_layout
from llama_ds.config.run_file import load_run
from llama_ds.errors import UserError

RUN = str(Path(__file__).resolve().parents[2] / "ds_configs" / "llama_65b.yaml")


def test_llama_65b_on_2048_ranks() -> None:
    assert resolve_layout(load_run(RUN), 2048) == Layout(2048, 8, 8, 32, 1, 64, 2048)


@pytest.mark.parametrize(
    ("world", "overrides", "rule"),
    [
        (2000, [], "world size 2000 is not a multiple of parallel.pp 8 * parallel.tp 8 = 64; "
         "start 1920, 1984 or 2048 ranks, or change parallel.pp or parallel.tp"),
        (1, [], "world size 1 is not a multiple of parallel.pp 8 * parallel.tp 8 = 64; "
         "start 64 or 128 ranks, or change parallel.pp or parallel.tp"),
        (2048, ["training.global_batch=2000"], "training.global_batch = 2000 is not a multiple of "
         "dp 32 = world 2048 / (pp 8 * tp 8); use 1984 or 2016"),
        (2048, ["parallel.micro_batch=6"], "parallel.micro_batch = 6 does not divide 2048 / dp 32 = 64; "
         "use 1, 2, 4, 8, 16, 32 or 64"),
    ],
)  # fmt: skip
def test_indivisible_numbers_are_told_with_those_that_would_do(world: int, overrides: list[str], rule: str) -> None:
    with pytest.raises(UserError) as error:
        resolve_layout(load_run(RUN, overrides), world)
    assert str(error.value) == f"{RUN}: {rule}"


def test_words() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert (listed([1]), listed([1, 2]), listed([1, 2, 3])) == ("1", "1 or 2", "1, 2 or 3")
