"""The weight table: name, role, shape, cut dimension, decay and initial values of every weight, by kind of layer.

Layers: 0 embedding, 1 .. L decoder, L + 1 final norm, L + 2 head (none where it is tied to the embedding). A weight's
key is (layer, local name), in memory and in files. A parameter finds its row by its name, never by its shape: under
ZeRO-3 a partitioned parameter has none.

Dimensions: vocab V, hidden D, intermediate F, queries H K, keys G K with H query and G key-value heads of size K.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Literal

from llama_ds.config.schema import ModelConfig

Key = tuple[int, str]
Dimension = Literal["vocab", "hidden", "intermediate", "queries", "keys"]
TIED_MODULES = "tied_modules."  # DeepSpeed's pipeline names tied weights by module instead of layer
TIED_TABLE = "embed"
_PREFIX = re.compile(rf"^(?:(?:layers\.)?(\d+)|{re.escape(TIED_MODULES)}{TIED_TABLE})\.")


class Role(Enum):
    """What a weight is to an optimizer."""

    EMBEDDING = "embedding"
    HIDDEN_MATRIX = "hidden matrix"
    NORM = "norm"
    HEAD = "head"


@dataclass(frozen=True)
class Weight:
    """A row of the table."""

    name: str  # of the parameter in its layer
    role: Role
    dimensions: tuple[Dimension, ...]
    cut: int | None  # dimension that tensor-parallel ranks cut; None: each of them holds the weight whole
    decays: bool = True
    seed_name: str | None = None  # initial values are drawn under this name; None: they are ones
    residual_output: bool = False  # the product is added to the residual stream

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Return the shape of the whole weight."""
        sizes: dict[Dimension, int] = {
            "vocab": model.vocab_size,
            "hidden": model.hidden_size,
            "intermediate": model.intermediate_size,
            "queries": model.num_attention_heads * model.head_dim,
            "keys": model.num_key_value_heads * model.head_dim,
        }
        return tuple(sizes[dimension] for dimension in self.dimensions)

    def numel(self, model: ModelConfig) -> int:
        """Return the number of elements of the whole weight."""
        return prod(self.shape(model))


def _norm(name: str) -> Weight:
    return Weight(name, Role.NORM, ("hidden",), cut=None, decays=False)


def _column_parallel(name: str, outputs: Dimension, inputs: Dimension, seed_name: str) -> Weight:
    return Weight(name, Role.HIDDEN_MATRIX, (outputs, inputs), cut=0, seed_name=seed_name)


def _row_parallel(name: str, outputs: Dimension, inputs: Dimension, seed_name: str) -> Weight:
    return Weight(name, Role.HIDDEN_MATRIX, (outputs, inputs), cut=1, seed_name=seed_name, residual_output=True)


GATE = _column_parallel("mlp.gate_proj.weight", "intermediate", "hidden", "gate_proj")

EMBEDDING = Weight("weight", Role.EMBEDDING, ("vocab", "hidden"), cut=0, seed_name="embed")
DECODER_LAYER = (
    _norm("input_layernorm.weight"),
    _column_parallel("self_attn.q_proj.weight", "queries", "hidden", "q_proj"),
    _column_parallel("self_attn.k_proj.weight", "keys", "hidden", "k_proj"),
    _column_parallel("self_attn.v_proj.weight", "keys", "hidden", "v_proj"),
    _row_parallel("self_attn.o_proj.weight", "hidden", "queries", "o_proj"),
    _norm("post_attention_layernorm.weight"),
    GATE,
    _column_parallel("mlp.up_proj.weight", "intermediate", "hidden", "up_proj"),
    _row_parallel("mlp.down_proj.weight", "hidden", "intermediate", "down_proj"),
)
FINAL_NORM = _norm("norm.weight")
HEAD = Weight("lm_head.weight", Role.HEAD, ("vocab", "hidden"), cut=0, seed_name="lm_head")

TABLE = (EMBEDDING, *DECODER_LAYER, FINAL_NORM, HEAD)
EMBEDDING_KEY: Key = (0, EMBEDDING.name)
_BY_NAME = {weight.name: weight for weight in TABLE}


def weights(model: ModelConfig) -> Iterator[tuple[Key, Weight]]:
    """Yield key and row of every weight of a model, in the order of its layers; a tied table once, as the embedding."""
    layers = model.num_hidden_layers
    yield EMBEDDING_KEY, EMBEDDING
    yield from (((layer, weight.name), weight) for layer in range(1, layers + 1) for weight in DECODER_LAYER)
    yield (layers + 1, FINAL_NORM.name), FINAL_NORM
    if not model.tie_word_embeddings:
        yield (layers + 2, HEAD.name), HEAD


def weight_shapes(model: ModelConfig) -> dict[Key, tuple[int, ...]]:
    """Return the whole shape of every weight of a model, in the order of its layers."""
    return {key: weight.shape(model) for key, weight in weights(model)}


def weight_of(name: str) -> Weight:
    """Return the row of a parameter by its name in its layer, or in any module that `key_of` reads names of."""
    return _BY_NAME[_PREFIX.sub("", name, count=1)]


def key_of(name: str) -> Key:
    """Return the key of a parameter as a DeepSpeed engine names it: with one stage, in a pipeline, tied."""
    prefix = _PREFIX.match(name)
    if prefix is None:
        raise ValueError(f"{name} is not the name of a parameter in a model")
    return int(prefix[1] or 0), name[prefix.end() :]


def held_elements(rows: Iterable[Weight], model: ModelConfig, tp: int) -> Counter[Role]:
    """Return how many elements of `rows` each of `tp` ranks holds, by role."""
    cut: Counter[Role] = Counter()
    whole: Counter[Role] = Counter()
    for weight in rows:
        (whole if weight.cut is None else cut)[weight.role] += weight.numel(model)
    return whole + Counter({role: count // tp for role, count in cut.items()})
