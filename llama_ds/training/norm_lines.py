"""The norms of every weight as lines of metrics.jsonl, each read after the step that it describes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from llama_ds.config.schema import RunConfig
from llama_ds.layout.weights import EMBEDDING, FINAL_NORM, HEAD, Key
from llama_ds.parallel.layer_norms import LayerNorms, Sums
from llama_ds.training.engines.interface import Engine, StepResult

DIGITS = 7  # of a number in a line: those that float32 has
_OUTSIDE = {EMBEDDING.name: "embedding", FINAL_NORM.name: "final_norm", HEAD.name: "head"}

Norms = Mapping[str, Mapping[str, list[float | None]]]  # by kind and role: a number for each layer that has the role


class NormLines:
    """Measures every `logging.norms`-th step; `take` returns its line one step later, or before that if asked."""

    def __init__(self, run: RunConfig, engine: Engine) -> None:
        self._interval = run.logging.norms
        self._norms = LayerNorms(engine.deepspeed, run.model) if self._interval else None
        self._unread: tuple[int, Sums, Tensor | float] | None = None

    def before_step(self, step: int) -> None:
        """Measure the step that will be the `step`-th if it is due."""
        if self._norms and step % self._interval == 0:
            self._norms.measure()

    def after_step(self, step: int, result: StepResult) -> None:
        """Begin to add up what `step` has measured. Collective."""
        if self._norms and step % self._interval == 0:
            self._unread = step, self._norms.sums(), result.norm

    def take(self) -> dict[str, Any] | None:
        """Return the line of the step that was measured last, once, else None. Synchronises if there is one."""
        if self._unread is None:
            return None
        step, sums, norm = self._unread
        self._unread = None
        return {"step": step, "norms": by_role(sums.wait(norm))}


def by_role(norms: Mapping[str, Mapping[Key, float]]) -> Norms:
    """Return norms by kind and role, with the layers of a role in their order; None: not finite."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for kind, values in norms.items():
        rows = found.setdefault(kind, {})
        for (_, name), value in values.items():
            number = float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
            rows.setdefault(role_of(name), []).append(number)
    return found


def role_of(name: str) -> str:
    """Return the short name of a weight, given its name within its layer: q_proj, or down_proj.bias."""
    short = name.removeprefix("self_attn.").removeprefix("mlp.").removesuffix(".weight")
    return _OUTSIDE.get(name, short)


def plotted(norms: Norms) -> Iterator[tuple[str, float]]:
    """Yield (name, number) of every finite norm for boards: gradient/q_proj/3, with decoder layers from 1."""
    for kind, rows in norms.items():
        for role, values in rows.items():
            for layer, value in enumerate(values, 1):
                if value is not None:
                    name = f"{kind}/{role}" if role in _OUTSIDE.values() else f"{kind}/{role}/{layer}"
                    yield f"norms/{name}", value
