"""The learning rate, step by step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llama_ds.config.schema import OptimizerConfig
from llama_ds.training.lr_schedule import learning_rate

COSINE = OptimizerConfig(lr=1.5e-4, warmup_steps=2000)
WSD = OptimizerConfig(lr=1e-3, schedule="wsd", warmup_steps=10, decay_steps=25, min_lr_ratio=0.0)


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert learning_rate(0, COSINE, 10_000) == 1.5e-4 / 2000
    assert learning_rate(999, COSINE, 10_000) == 1.5e-4 / 2
    assert learning_rate(1999, COSINE, 10_000) == 1.5e-4


def test_cosine_passes_its_middle_and_ends_at_a_tenth() -> None:
    middle = 2000 + (10_000 - 2000) // 2 - 1
    assert learning_rate(middle, COSINE, 10_000) == pytest.approx(1.5e-4 * (0.1 + 0.9 / 2), rel=1e-12)
    assert learning_rate(9999, COSINE, 10_000) == pytest.approx(1.5e-5, rel=1e-12)
    assert learning_rate(20_000, COSINE, 10_000) == learning_rate(9999, COSINE, 10_000)


def test_wsd_is_stable_then_decays_as_one_minus_square_root() -> None:
    assert {learning_rate(step, WSD, 100) for step in range(9, 75)} == {1e-3}
    assert learning_rate(75, WSD, 100) == pytest.approx(1e-3 * (1 - math.sqrt(1 / 25)), rel=1e-12)
    assert learning_rate(99, WSD, 100) == 0.0
    assert learning_rate(99, replace(WSD, min_lr_ratio=0.1), 100) == pytest.approx(1e-4, rel=1e-12)


def test_wsd_decays_linearly_if_asked() -> None:
    linear = replace(WSD, decay_shape="linear", min_lr_ratio=0.2)
    rates = [learning_rate(step, linear, 100) for step in range(74, 100)]
    assert rates == pytest.approx([1e-3 * (1 - 0.8 * done / 25) for done in range(26)], rel=1e-12)


def test_linear_decays_from_the_end_of_warm_up() -> None:
    linear = replace(COSINE, schedule="linear", warmup_steps=10)
    rates = [learning_rate(step, linear, 100) for step in range(9, 100)]
    assert rates == pytest.approx([1.5e-4 * (1 - 0.9 * done / 90) for done in range(91)], rel=1e-12)


def test_inverse_sqrt_is_the_same_in_a_longer_run_and_has_a_floor() -> None:
    optimizer = replace(COSINE, schedule="inverse_sqrt", warmup_steps=100)
    for step in (99, 399, 2499):
        assert learning_rate(step, optimizer, 5000) == pytest.approx(1.5e-4 * 10 / math.sqrt(step + 1), rel=1e-12)
        assert learning_rate(step, optimizer, 5000) == learning_rate(step, optimizer, 10**6)
    assert learning_rate(10**6, optimizer, 10**7) == 1.5e-4 * 0.1
    assert learning_rate(3, replace(optimizer, warmup_steps=0), 100) == 1.5e-4 / 2


def test_constant_stays_at_the_peak() -> None:
    optimizer = replace(COSINE, schedule="constant", warmup_steps=10)
    assert {learning_rate(step, optimizer, 100) for step in range(9, 200)} == {1.5e-4}


def test_a_decay_restarts_from_any_step_of_a_stable_phase() -> None:
    """A run with constant, and runs with wsd that end earlier, have the same rates until the decay of the latter."""
    stable = replace(WSD, schedule="constant", decay_steps=0)
    for steps in (60, 80, 200):
        shared = range(steps - WSD.decay_steps)
        assert [learning_rate(s, WSD, steps) for s in shared] == [learning_rate(s, stable, 10**6) for s in shared]
        assert learning_rate(steps - 1, WSD, steps) == 0


DECAYS = [*(replace(COSINE, schedule=name) for name in ("cosine", "linear", "inverse_sqrt", "constant")), WSD]


@pytest.mark.parametrize("optimizer", [replace(optimizer, warmup_steps=2000) for optimizer in DECAYS])
def test_it_rises_then_never_rises_again(optimizer: OptimizerConfig) -> None:
    rates = [learning_rate(step, optimizer, 5000) for step in range(5000)]
    assert rates[:2000] == sorted(rates[:2000]) and rates[1999:] == sorted(rates[1999:], reverse=True)
    assert min(rates) >= 0 and max(rates) == optimizer.lr


def test_without_warm_up() -> None:
    assert learning_rate(0, replace(COSINE, warmup_steps=0), 10) < 1.5e-4
    assert learning_rate(0, replace(WSD, warmup_steps=0), 100) == 1e-3
