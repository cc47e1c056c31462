"""muP's factors of the function folded into weights, for formats whose models have no such factors.

The factor of the logits goes into the final norm, which works for tied tables, too. That of attention scores goes into
q and its bias, or into the norm of queries where there is one. The result computes the same function; its weights are
those of the model times a factor, rounded once to the dtype in which they are read. A power of two is exact.
"""

from __future__ import annotations

from dataclasses import replace
from math import frexp

import torch
from torch import Tensor

from llama_ds.checkpoint.weights import ModelFiles, Readable
from llama_ds.config.schema import ModelConfig
from llama_ds.layout.mup import inverse_width, scores_factor
from llama_ds.layout.weights import FINAL_NORM, QUERY, QUERY_NORM, bias_of


class Scaled:
    """A stored weight times a factor."""

    def __init__(self, stored: Readable, factor: float) -> None:
        self.stored, self.factor, self.shape = stored, factor, stored.shape

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        return self.stored.dtype

    @property
    def paths(self) -> set[str]:
        """The files that hold the weight."""
        return self.stored.paths

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the unsharded tensor, in `dtype` or as stored."""
        return (self.stored.whole(torch.float64) * self.factor).to(dtype or self.dtype)

    def read(self, out: Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        """Fill `out` as `Readable.read` does."""
        wide = torch.empty_like(out, dtype=torch.float64)
        self.stored.read(wide, rank, size, start)
        out.copy_(wide.mul_(self.factor))


def folded(files: ModelFiles) -> ModelFiles:
    """Return the files of a model without muP that computes the same function; a model without it is returned as is."""
    model = files.model
    if model.mup is None:
        return files
    scores = (QUERY_NORM,) if model.qk_norm else (QUERY, bias_of(QUERY, model))
    factors = {FINAL_NORM.name: inverse_width(model), **{w.name: scores_factor(model) for w in scores if w}}
    factors = {name: factor for name, factor in factors.items() if factor != 1}
    plain = replace(
        files,
        model=replace(model, mup=None),
        tensors={key: _scaled(weight, factors.get(key[1], 1.0)) for key, weight in files.tensors.items()},
        masters=files.masters
        and {key: _scaled(weight, factors.get(key[1], 1.0)) for key, weight in files.masters.items()},
    )
    notes = (
        f"folded: muP's factor {factor:g} into {name}{'' if _is_power_of_two(factor) else ', rounded'}"
        for name, factor in factors.items()
    )
    return replace(plain, notes=(*files.notes, *notes))


def _scaled(weight: Readable, factor: float) -> Readable:
    return weight if factor == 1 else Scaled(weight, factor)


def exactly_folded(model: ModelConfig, dtype: str) -> bool:
    """Return whether folding `model` into weights of `dtype` changes its logits by no more than rounding to fp32."""
    return dtype == "fp32" or all(map(_is_power_of_two, (inverse_width(model), scores_factor(model))))


def _is_power_of_two(factor: float) -> bool:
    return frexp(factor)[0] == 0.5
