"""The section of the run file about muP, with which hyperparameters tuned on a narrow model suit wider ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from llama_ds.config.declare import POSITIVE, Key, Section


@dataclass(frozen=True)
class MupConfig(Section):
    """Maximal update parametrization (Yang et al., arXiv 2203.03466, table 8), relative to a base width.

    It is part of the model, because logits and attention scores have factors of their own.
    """

    SECTION: ClassVar[str] = "model.mup"

    base_width: Annotated[
        int,
        Key(
            "`hidden_size` at which nothing changes: that of the model on which hyperparameters were tuned.",
            sign=POSITIVE,
            rule="1/256 to 256 times `hidden_size`; the widths of attention and feed-forward grow with `hidden_size`.",
            most=1e6,
        ),
    ]
    base_head_dim: Annotated[
        int | None,
        Key(
            "`head_dim` of that model; attention scores are scaled by `sqrt(base_head_dim) / head_dim`.",
            sign=POSITIVE,
            rule="1/256 to 256 times `head_dim`.",
            default="`head_dim`: wider models have more heads",
            most=1e5,
        ),
    ] = None
