"""Gradient norms far from their peers' are named, and rows do not raise an alarm."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llama_ds.training.gradient_outliers import REFUSED_FACTOR, SHORTEST, GradientOutliers

GROUPS = [[0, 2, 4, 6], [1, 3, 5, 7]]  # two stages of four replicas, whose norms differ


def draw(rows: np.random.Generator, level: float = 1.0, spread: float = 0.2) -> np.ndarray:
    """Return the norms of a step: lognormal with tails like those of Student's t with 3 degrees of freedom."""
    return level * np.array([1.0, 30.0] * 4) * np.exp(spread * rows.standard_t(3, 8))


def settled(rows: np.random.Generator, spread: float = 0.2) -> GradientOutliers:
    outliers = GradientOutliers(GROUPS)
    for _ in range(SHORTEST):
        outliers.judge(draw(rows, spread=spread))
    return outliers


@pytest.mark.parametrize("spread", [0.02, 0.4])
def test_no_clean_step_is_refused(spread: float) -> None:
    """2,000 steps with heavy tails, of which the first fifty have norms a hundred times as large, as after a start.

    Norms are cut at a factor of 7 from the usual one, so that two ranks may be a factor of 49 apart.
    """
    rows, outliers = np.random.default_rng(0), GradientOutliers(GROUPS)
    for step in range(2_000):
        norms = draw(rows, 100.0 / (1 + step) if step < 50 else 1.0, spread)
        usual = np.exp(np.mean(np.log(norms.reshape(4, 2)), 0))
        norms = np.clip(norms, np.tile(usual / 7, 4), np.tile(usual * 7, 4))
        assert not any(one.refused for one in outliers.judge(norms)), step


def test_a_rank_that_is_far_outside_is_refused_and_named_first() -> None:
    rows = np.random.default_rng(1)
    for exponent in (11, 16, 64, 120, -16):
        outliers = settled(rows)
        norms = draw(rows)
        norms[4] *= 2.0**exponent
        (worst, *others) = outliers.judge(norms)
        assert worst.rank == 4 and worst.refused and not others, exponent
    assert outliers.judge(draw(rows)) == [], "the outlier did not become usual"


def test_a_loss_spike_on_all_ranks_is_none() -> None:
    rows = np.random.default_rng(2)
    assert settled(rows).judge(draw(rows, 1e4)) == []


def test_a_rank_that_is_somewhat_outside_is_reported_only() -> None:
    rows = np.random.default_rng(3)
    outliers = settled(rows, 0.02)
    norms = draw(rows, spread=0.02)
    norms[3] *= 20
    (found,) = outliers.judge(norms)
    assert found.rank == 3 and not found.refused and found.norm / found.median == pytest.approx(20, rel=0.2)
    assert GradientOutliers(GROUPS).judge(norms) == [], "before that, what is usual is not known"
    norms[3] *= 20 * REFUSED_FACTOR
    assert GradientOutliers(GROUPS).judge(norms)[0].refused, "but this is far from any"


def test_norms_that_are_not_finite() -> None:
    """A replica's are a fault of one of its ranks; all replicas' are the run's divergence, which others report."""
    rows = np.random.default_rng(4)
    for bad in (math.nan, math.inf):
        norms = draw(rows)
        norms[[4, 5]] = bad
        assert [one.rank for one in settled(rows).judge(norms) if one.refused] == [4, 5]
        assert settled(rows).judge(np.full(8, bad)) == []


def test_of_two_replicas_the_one_that_changed_is_named() -> None:
    rows = np.random.default_rng(5)
    outliers = GradientOutliers([[0, 1]])
    for _ in range(SHORTEST):
        outliers.judge(np.exp(0.1 * rows.standard_normal(2)))
    assert [one.rank for one in outliers.judge(np.array([1.0, 1e6]))] == [1]
    assert [one.rank for one in outliers.judge(np.array([1e-6, 1.0]))] == [0]
    assert GradientOutliers([[0], [1]]).judge(np.array([1.0, 1e6])) == [], "one replica has no peers"
