"""Chinchilla's loss law fitted to runs: L(N, D) = E + A / N^alpha + B / D^beta (arXiv 2203.15556, approach 3).

The fit minimizes the Huber loss of log L with L-BFGS from a grid of starts, as in the paper's section 3.3. Intervals
come from a bootstrap of the residuals: a ladder has too few runs to leave some out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from llama_ds.errors import UserError
from llama_ds.experiments.ladder.spec import FEWEST_RUNS, FEWEST_VALUES, suffice

DELTA = 1e-3  # threshold of the Huber loss, as in the paper
CONSTANTS = 5
STARTS = 12  # best points of the grid, from which L-BFGS starts
SAMPLES = 200
LEVEL = 0.95
LARGEST = 1e13  # parameters or tokens that a choice may name


@dataclass(frozen=True)
class Law:
    """Constants of the law; loss in nats per token, N in parameters, D in tokens."""

    E: float  # irreducible loss
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss of a size after a number of tokens."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def tokens_for(self, target: float, parameters: float) -> float:
        """Return the tokens with which a size reaches a loss; infinity if it never does."""
        rest = target - self.E - self.A / parameters**self.alpha
        if rest <= 0:
            return math.inf
        power = math.log(self.B / rest) / self.beta
        return math.exp(power) if power < 700 else math.inf

    def optimal(self, flops: float) -> tuple[float, float]:
        """Return parameters and tokens with the least loss for 6 N D FLOPs (the paper's equation 4)."""
        total = self.alpha + self.beta
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        return scale * (flops / 6) ** (self.beta / total), (flops / 6) ** (self.alpha / total) / scale


@dataclass(frozen=True)
class Fit:
    """A law, the laws of the bootstrap's samples, and the residuals."""

    law: Law
    samples: Sequence[Law]
    residuals: Sequence[float]  # log of measured loss - log of the law's, widened by the lost degrees of freedom

    def interval(self, name: str) -> tuple[float, float]:
        """Return the interval of one constant."""
        return _interval([getattr(law, name) for law in self.samples])

    def prediction(self, parameters: float, tokens: float, seed: int = 0) -> tuple[float, float, float]:
        """Return the loss of a run and the interval of one measurement: that of the law and the runs' scatter."""
        drawn = np.random.default_rng(seed).choice(self.residuals, len(self.samples))
        found = [law.loss(parameters, tokens) * math.exp(noise) for law, noise in zip(self.samples, drawn, strict=True)]
        return self.law.loss(parameters, tokens), *_interval(found)


def fit_law(
    parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], samples: int = SAMPLES, seed: int = 0
) -> Fit:
    """Return the law that fits the runs, and its bootstrap.

    Args:
        parameters, tokens, losses: one entry for each run.

    Raises:
        UserError: the runs are too few, or too alike, for five constants.
    """
    n, d, y = (np.log(np.asarray(values, dtype=float)) for values in (parameters, tokens, losses))
    if not suffice(parameters, tokens):
        raise UserError(
            f"fit: {len(y)} runs of {len(set(parameters))} sizes and {len(set(tokens))} token counts do not "
            f"determine the law's {CONSTANTS} constants; train at least {FEWEST_RUNS} different ones with "
            f"{FEWEST_VALUES} of each"
        )
    middle = (float(n.mean()), float(d.mean()))
    best = min((_descend(start, n, d, y, middle) for start in _starts(n, d, y, middle)), key=lambda found: found[0])[1]
    predicted = _log_loss(best, n, d, middle)[0]
    residuals = (y - predicted) * math.sqrt(len(y) / (len(y) - CONSTANTS))
    residuals = residuals - residuals.mean()
    random = np.random.default_rng(seed)
    again = [_descend(best, n, d, predicted + random.choice(residuals, len(y)), middle)[1] for _ in range(samples)]
    return Fit(_law(best, middle), [_law(one, middle) for one in again], residuals.tolist())


def _log_loss(point: np.ndarray, n: np.ndarray, d: np.ndarray, middle: tuple[float, float]) -> tuple:
    """Return log L of each run, and its three terms; `point` is log of A and B's terms at the middle, log E, powers."""
    a, b, e, alpha, beta = point
    terms = np.stack([a - alpha * (n - middle[0]), b - beta * (d - middle[1]), np.full_like(n, e)])
    return logsumexp(terms, axis=0), terms


def _objective(point: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray, middle: tuple) -> tuple:
    """Return the sum of Huber losses and its gradient."""
    predicted, terms = _log_loss(point, n, d, middle)
    error = (predicted - y) / DELTA
    size = np.abs(error)
    value = np.where(size <= 1, error**2 / 2, size - 0.5).sum()
    share = softmax(terms, axis=0) * np.clip(error, -1, 1) / DELTA
    gradient = [*share.sum(axis=1), -(share[0] * (n - middle[0])).sum(), -(share[1] * (d - middle[1])).sum()]
    return value, np.array(gradient)


def _starts(n: np.ndarray, d: np.ndarray, y: np.ndarray, middle: tuple[float, float]) -> list[np.ndarray]:
    """Return the best points of a grid: shares of the mean loss, and powers."""
    mean, shares, powers = math.log(float(np.exp(y).mean())), (0.05, 0.2, 0.5), (0.1, 0.3, 0.5, 1.0)
    grid = [
        np.array([mean + math.log(a), mean + math.log(b), mean + math.log(1 - a - b), alpha, beta])
        for a, b, alpha, beta in product(shares, shares, powers, powers)
        if a + b < 1
    ]
    return sorted(grid, key=lambda point: _objective(point, n, d, y, middle)[0])[:STARTS]


def _descend(start: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray, middle: tuple) -> tuple[float, np.ndarray]:
    bounds = [(-12, 6), (-12, 6), (-12, 6), (0.01, 3), (0.01, 3)]
    found = minimize(
        _objective, start, args=(n, d, y, middle), jac=True, method="L-BFGS-B", bounds=bounds,
        options={"maxiter": 1000, "maxfun": 2000, "ftol": 1e-14, "gtol": 1e-8},
    )  # fmt: skip
    return float(found.fun), found.x


def _law(point: np.ndarray, middle: tuple[float, float]) -> Law:
    a, b, e, alpha, beta = map(float, point)
    return Law(math.exp(e), math.exp(a + alpha * middle[0]), math.exp(b + beta * middle[1]), alpha, beta)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def cheapest(law: Law, target: float, queries: float, training: float = 1.0, inference: float = 1.0) -> tuple:
    """Return (parameters, tokens) that reach a loss at the least cost of training and inference.

    6 N D for training and 2 N for each token of inference (Sardana et al., arXiv 2401.00448), each times its price of a
    FLOP. As in the LLaMA paper, more inference makes a smaller model on more tokens the best.

    Args:
        queries: tokens of inference over the model's life.

    Raises:
        UserError: the law does not reach the target.
    """
    if target <= law.E:
        raise UserError(f"target loss {target:g} is not above the law's irreducible loss {law.E:.4g}; raise it")
    floor = (law.A / (target - law.E)) ** (1 / law.alpha)
    if not floor < LARGEST / 1.01:
        raise UserError(f"target loss {target:g} needs more than {LARGEST:g} parameters by the law; raise it")
    sizes = np.geomspace(floor * 1.001, LARGEST, 20_000)
    tokens = np.array([law.tokens_for(target, size) for size in sizes])
    with np.errstate(over="ignore"):
        costs = sizes * (6 * tokens * training + 2 * queries * inference)
    best = int(np.argmin(costs))
    if not np.isfinite(costs[best]) or tokens[best] > LARGEST:
        raise UserError(f"target loss {target:g} needs more than {LARGEST:g} tokens by the law; raise it")
    return float(sizes[best]), float(tokens[best])
