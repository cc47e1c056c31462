"""One run's model at several widths, with muP and without, trained on one process: do hyperparameters suit all widths?

A coordinate check (Yang et al., arXiv 2203.03466, appendix D.1) trains each width for a few steps and measures the size
of activations: with muP it does not depend on the width. A sweep trains each width with several learning rates.

Layers, optimizer groups and rows are those of a run; the steps are taken in plain torch without DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from llama_ds.config.schema import ModelConfig, MupConfig, RunConfig
from llama_ds.data.source.store import BadFile
from llama_ds.data.stream import Dataset, open_data
from llama_ds.errors import UserError
from llama_ds.model.decoder import DecoderLayer
from llama_ds.model.llama import Llama, layer_context
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.tensor_parallel import SingleRank
from llama_ds.training.device_batches import ids_and_labels
from llama_ds.training.engines.optimizer_groups import build_optimizer, decay_groups
from llama_ds.training.lr_schedule import learning_rate

KINDS = ("residual stream", "attention output", "feed-forward output", "logits")
PARAMETRIZATIONS = ("standard", "mup")
FEW_STEPS = 20  # the last ones, whose mean training loss is the result of a sweep
CPU = torch.device("cpu")

Say = Callable[[str], None]


def model_of_width(model: ModelConfig, width: int, parametrization: str) -> ModelConfig:
    """Return the model with another width, and heads and features in proportion; heads keep their size.

    The base of muP is that of the model, or the model itself.

    Raises:
        UserError: it has no whole number of heads.
    """
    heads, groups = (n * width / model.hidden_size for n in (model.num_attention_heads, model.num_key_value_heads))
    if not heads.is_integer() or not groups.is_integer():
        unit = model.hidden_size // math.gcd(model.num_attention_heads, model.num_key_value_heads, model.hidden_size)
        raise UserError(
            f"command line: --widths {width} would have {heads:g} heads and {groups:g} key-value heads; use multiples "
            f"of {unit}, or change model.num_attention_heads and num_key_value_heads"
        )
    return replace(
        model,
        hidden_size=width,
        intermediate_size=round(model.intermediate_size * width / model.hidden_size),
        num_attention_heads=int(heads),
        num_key_value_heads=int(groups),
        mup=(model.mup or MupConfig(model.hidden_size)) if parametrization == "mup" else None,
    )


def coordinate_check(run: RunConfig, widths: Sequence[int], steps: int, say: Say) -> dict[str, Any]:
    """Return mean absolute activations of every kind, width and step, and the slope of their logarithms over widths.

    The learning rate is constant. Step 0 is before the first step; every step trains and measures on its own rows.

    Raises:
        UserError: a width has no whole number of heads, the optimizer is Muon, or the data cannot be used.
    """
    data = _opened(run, widths)
    found: dict[str, dict[str, list[list[float]]]] = {}
    for how in PARAMETRIZATIONS:
        found[how] = {kind: [] for kind in KINDS}
        for width in widths:
            say(f"{how}, width {width}: {steps} steps")
            sizes = list(_activations(_with_width(run, width, how), data, steps))
            for kind in KINDS:
                found[how][kind].append([size[kind] for size in sizes])
    slopes = {
        how: {kind: [_slope(widths, column) for column in zip(*values, strict=True)] for kind, values in kinds.items()}
        for how, kinds in found.items()
    }
    return {"widths": list(widths), "steps": steps, "mean_abs": found, "slopes": slopes, "run": _about(run)}


def rate_sweep(run: RunConfig, widths: Sequence[int], rates: Sequence[float], say: Say) -> dict[str, Any]:
    """Return the mean training loss of the last steps for every width and learning rate, in nats per token.

    A loss that is not finite is None. Errors are those of `coordinate_check`.
    """
    data = _opened(run, widths)
    losses: dict[str, list[list[float | None]]] = {}
    for how in PARAMETRIZATIONS:
        losses[how] = []
        for width in widths:
            losses[how].append([])
            for rate in rates:
                sized = _with_width(run, width, how)
                loss = _trained_loss(replace(sized, optimizer=replace(run.optimizer, lr=rate)), data)
                say(f"{how}, width {width}, learning rate {rate:g}: loss {loss:.4f}")
                losses[how][-1].append(loss if math.isfinite(loss) else None)
    best = {how: [_best(rates, row) for row in rows] for how, rows in losses.items()}
    return {"widths": list(widths), "rates": list(rates), "losses": losses, "best": best, "run": _about(run)}


def _opened(run: RunConfig, widths: Sequence[int]) -> Dataset:
    """Check what would only show after hours, and open the data."""
    if run.optimizer.name == "muon":
        raise UserError(f"{run.path}: optimizer.name = muon needs an engine, which this has not; use adamw")
    if run.optimizer.masters != "fp32":
        raise UserError(f"{run.path}: optimizer.masters = {run.optimizer.masters} needs an engine; use fp32")
    for how in PARAMETRIZATIONS:
        for width in widths:
            _with_width(run, width, how)
    return open_data(run)


def _with_width(run: RunConfig, width: int, parametrization: str) -> RunConfig:
    return replace(run, model=model_of_width(run.model, width, parametrization))


class _Training:
    """A model on this process, which takes steps of a run."""

    def __init__(self, run: RunConfig, data: Dataset, policies: Sequence[str] | None) -> None:
        context = layer_context(run, SingleRank(), "cpu", torch.float32, data.sources.tokenizer.marks)
        self.model = Llama(context, NextTokenLoss(context.tp, run.optimizer.z_loss), policies)
        groups = decay_groups(self.model, run.optimizer, run.model)
        self.optimizer = build_optimizer(groups, run, {"bf16": {"enabled": False}})
        self._data, self._clip = data, run.optimizer.clip

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        """Return ids and labels of the rows of a step."""
        try:
            return ids_and_labels(self._data.read(self._data.order.rows_of(step)), CPU)
        except BadFile as error:
            raise UserError(f"{error}; copy the shard again") from None

    def step(self, step: int, lr: float) -> float:
        """Take a step on its rows and return their loss."""
        loss = self.model(*self.rows(step))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        self.optimizer.step()
        return float(loss.detach())


def _activations(run: RunConfig, data: Dataset, steps: int) -> Iterator[dict[str, float]]:
    training = _Training(run, data, None)
    for step in range(steps + 1):
        with torch.no_grad(), _measured(training.model) as sizes:
            logits = training.model(training.rows(step)[0])
            sizes["logits"].append(float(logits.abs().mean()))
        yield {kind: float(np.mean(sizes[kind])) for kind in KINDS}
        if step < steps:
            training.step(step, run.optimizer.lr)


@contextmanager
def _measured(model: Llama) -> Iterator[dict[str, list[float]]]:
    """Record the mean absolute outputs of every decoder layer and of its two branches."""
    sizes: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def record(kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            sizes[kind].append(float(cast(Tensor, x).abs().mean()))

        return hook

    layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
    parts = [part for layer in layers for part in zip(KINDS, (layer, layer.self_attn, layer.mlp), strict=False)]
    handles = [module.register_forward_hook(record(kind)) for kind, module in parts]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def _trained_loss(run: RunConfig, data: Dataset) -> float:
    steps = run.training.steps
    training = _Training(run, data, ["none"] * run.model.num_hidden_layers)
    losses = [training.step(step, learning_rate(step, run.optimizer, steps)) for step in range(steps)]
    return float(np.mean(losses[-FEW_STEPS:]))


def _slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """Return the exponent of a power of the width, by least squares."""
    return float(np.polyfit(np.log(widths), np.log(sizes), 1)[0])


def _best(rates: Sequence[float], losses: Sequence[float | None]) -> float | None:
    finite = [(loss, rate) for rate, loss in zip(rates, losses, strict=True) if loss is not None]
    return min(finite)[1] if finite else None


def _about(run: RunConfig) -> dict[str, Any]:
    return {
        "model": asdict(run.model),
        "optimizer": asdict(run.optimizer),
        "seq_len": run.data.seq_len,
        "global_batch": run.training.global_batch,
        "steps": run.training.steps,
        "seed": run.seed,
    }
