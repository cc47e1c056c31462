"""Energy and carbon agree with the LLaMA paper's table 15; the cheapest size over a model's lifetime."""

from __future__ import annotations

import math

import pytest

from llama_ds.errors import UserError
from llama_ds.perf.plan.cost import (
    TABLE_15,
    TABLE_15_TOKENS,
    Cost,
    Rates,
    cheapest,
    life,
    loss,
    run_cost,
    tokens_for,
)

RATES = Rates(1.4e14, 0.8e14)


@pytest.mark.parametrize(
    ("size", "mwh", "tonnes"), [("7b", 36, 14), ("13b", 59, 23), ("33b", 233, 90), ("65b", 449, 173)]
)
def test_table_15_is_reproduced(size: str, mwh: float, tonnes: float) -> None:
    cost = Cost(TABLE_15[size], 2048, 400)
    assert cost.megawatt_hours == pytest.approx(mwh, abs=1)
    assert cost.carbon_tonnes == pytest.approx(tonnes, abs=1)
    speed = TABLE_15_TOKENS[size] / TABLE_15[size] / 3600
    assert run_cost(TABLE_15_TOKENS[size], speed, 2048, 400).gpu_hours == pytest.approx(TABLE_15[size])


def test_65b_takes_21_days() -> None:
    assert run_cost(1.4e12, 380, 2048, 400).days == pytest.approx(20.8, abs=0.1)


def test_tokens_for_is_the_inverse_of_the_loss_law() -> None:
    tokens = tokens_for(2.0, 7e10)
    assert loss(7e10, tokens) == pytest.approx(2.0)
    assert tokens_for(2.0, 1e8) == math.inf


def test_no_size_is_cheaper_than_the_cheapest() -> None:
    for inference in (0.0, 1e12, 1e14):
        best = cheapest(2.0, inference, RATES)
        for factor in (0.7, 0.9, 1.1, 1.5):
            assert life(2.0, best.parameters * factor, inference, RATES).hours >= best.hours
        assert loss(best.parameters, best.tokens) == pytest.approx(2.0)


def test_more_inference_favours_smaller_models_trained_longer() -> None:
    """The LLaMA paper's argument (section 1): the best size for training alone is not the best over the lifetime."""
    sizes = [cheapest(2.0, tokens, RATES).parameters for tokens in (0, 1e12, 1e13, 1e14)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.2 * sizes[-1]


@pytest.mark.parametrize("target", [1.69, 1.0, float("nan"), float("inf"), 1.690001])
def test_a_loss_that_cannot_be_reached_is_refused(target: float) -> None:
    with pytest.raises(UserError, match="--target-loss"):
        cheapest(target, 0, RATES)


@pytest.mark.parametrize("speed", [0, -1, float("nan"), float("inf")])
def test_a_speed_that_is_not_positive_is_refused(speed: float) -> None:
    with pytest.raises(UserError, match="--tokens-per-second"):
        run_cost(1e12, speed, 8, 400)
