"""Cost of a run in GPU-hours, energy and carbon, and the model size that is cheapest over its lifetime.

Energy and carbon follow the LLaMA paper's table 15 (arXiv 2302.13971, section 6): GPU-hours x power of a GPU x 1.1
(the data centre's PUE), and 0.385 kg CO2eq per kWh, the mean of the US grid. The loss law is Chinchilla's (Hoffmann
et al., arXiv 2203.15556, section D.3): L(N, D) = E + A / N^alpha + B / D^beta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llama_ds.errors import UserError

OVERHEAD = 1.1  # power usage effectiveness (PUE)
CARBON = 0.385  # kg CO2eq per kWh
TABLE_15 = {"7b": 82_432, "13b": 135_168, "33b": 530_432, "65b": 1_022_362}  # GPU-hours on A100-80GB
TABLE_15_TOKENS = {"7b": 1.0e12, "13b": 1.0e12, "33b": 1.4e12, "65b": 1.4e12}

E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28
LAW = f"L = {E:g} + {A:g} / N^{ALPHA:g} + {B:g} / D^{BETA:g}"
_SMALLEST, _LARGEST = 1e7, 1e13  # range of model sizes to consider, in parameters


@dataclass(frozen=True)
class Cost:
    """Cost of one run."""

    gpu_hours: float
    gpus: int
    power_w: float

    @property
    def days(self) -> float:
        return self.gpu_hours / self.gpus / 24

    @property
    def megawatt_hours(self) -> float:
        return self.gpu_hours * self.power_w * OVERHEAD / 1e6

    @property
    def carbon_tonnes(self) -> float:
        """Tonnes of CO2eq."""
        return self.megawatt_hours * CARBON


def run_cost(tokens: float, tokens_per_second: float, gpus: int, power_w: float) -> Cost:
    """Return the cost of training on `tokens`.

    Args:
        tokens_per_second: throughput of one GPU.
        power_w: power of one GPU in watts.

    Raises:
        UserError: A number is not positive.
    """
    given = {"--tokens": tokens, "--tokens-per-second": tokens_per_second, "--gpus": gpus, "--power-w": power_w}
    for name, value in given.items():
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} = {value:g} is not a positive number; give one")
    return Cost(tokens / tokens_per_second / 3600, gpus, power_w)


def loss(parameters: float, tokens: float) -> float:
    """Return the loss that the law predicts for a model size and a number of training tokens, in nats per token."""
    return E + A / parameters**ALPHA + B / tokens**BETA


def tokens_for(target: float, parameters: float) -> float:
    """Return the training tokens with which a model of this size reaches `target`; infinity if it never does."""
    rest = target - E - A / parameters**ALPHA
    return (B / rest) ** (1 / BETA) if rest > 0 else math.inf


@dataclass(frozen=True)
class Life:
    """Lifetime cost of a model size that reaches the target loss: training and inference."""

    parameters: float
    tokens: float
    training_flops: float  # 6 N D
    inference_flops: float  # 2 N per token
    training_hours: float
    inference_hours: float

    @property
    def hours(self) -> float:
        """GPU-hours over the model's lifetime."""
        return self.training_hours + self.inference_hours


@dataclass(frozen=True)
class Rates:
    """FLOP/s of one GPU in training and in inference."""

    training: float
    inference: float


def life(target: float, parameters: float, inference_tokens: float, rates: Rates) -> Life:
    """Return the lifetime cost of a model of this size."""
    tokens = tokens_for(target, parameters)
    training, inference = 6 * parameters * tokens, 2 * parameters * inference_tokens
    return Life(
        parameters, tokens, training, inference, training / rates.training / 3600, inference / rates.inference / 3600
    )


def cheapest(target: float, inference_tokens: float, rates: Rates) -> Life:
    """Return the size that reaches `target` for the fewest GPU-hours over its lifetime, by golden section on log N.

    The cost falls and then rises with N: small models need very many tokens, large ones cost more per token.

    Raises:
        UserError: No size reaches the target by the law, or none within ten trillion parameters.
    """
    _check_target(target, inference_tokens)
    floor = (A / (target - E)) ** (1 / ALPHA)  # size that reaches the target with infinitely many tokens
    if floor * 1.001 >= _LARGEST:
        raise UserError(
            f"--target-loss {target:g}: the law needs more than {_LARGEST:.0e} parameters for it; use "
            f"{E + A / (_LARGEST / 10) ** ALPHA:.3f} or more"
        )
    low, high = math.log(max(_SMALLEST, floor * 1.001)), math.log(_LARGEST)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(200):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if _hours(target, left, inference_tokens, rates) < _hours(target, right, inference_tokens, rates):
            high = right
        else:
            low = left
    return life(target, math.exp((low + high) / 2), inference_tokens, rates)


def _hours(target: float, log_parameters: float, inference_tokens: float, rates: Rates) -> float:
    return life(target, math.exp(log_parameters), inference_tokens, rates).hours


def _check_target(target: float, inference_tokens: float) -> None:
    if not math.isfinite(target) or target <= E:
        raise UserError(
            f"--target-loss {target:g}: the law's loss stays above {E:g} with any size and tokens (Chinchilla, "
            f"section D.3); use more, such as 2.0"
        )
    if not math.isfinite(inference_tokens) or inference_tokens < 0:
        raise UserError(f"--inference-tokens {inference_tokens:g} is not a number of 0 or more; use one such as 1T")
