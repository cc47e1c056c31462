"""The weight table: name, role, shape, sharded dimension, decay and initial values of every weight.

Layers: 0 embedding, 1 .. L decoder, L + 1 final norm, L + 2 head (absent if tied to the embedding). The key of a weight
is (layer, local name), in memory and in files. A parameter is looked up by its name, never by its shape, because a
parameter that ZeRO-3 partitions has an empty shape.

Dimensions: vocab V, hidden D, intermediate F, queries H K, keys G K with H query and G key-value heads of size K.

LLaMA has no biases and no norms of queries and keys; those of its neighbours are rows that only their models have.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from math import prod
from typing import Literal

from llama_ds.config.schema import ModelConfig
from llama_ds.layout.vocab_parts import own_rows, part_rows

Key = tuple[int, str]
Dimension = Literal["vocab", "hidden", "intermediate", "queries", "keys", "head"]
BIAS = ".bias"
TIED_MODULES = "tied_modules."  # DeepSpeed's pipeline names tied weights by module instead of layer
TIED_TABLE = "embed"
_PREFIX = re.compile(rf"^(?:(?:layers\.)?(\d+)|{re.escape(TIED_MODULES)}{TIED_TABLE})\.")


class Role(Enum):
    """Role of a weight, by which optimizers distinguish weights."""

    EMBEDDING = "embedding"
    HIDDEN_MATRIX = "hidden matrix"
    NORM = "norm"
    BIAS = "bias"
    HEAD = "head"


@dataclass(frozen=True)
class Weight:
    """A row of the table."""

    name: str  # parameter name within its layer
    role: Role
    dimensions: tuple[Dimension, ...]
    cut: int | None  # dimension sharded over tensor-parallel ranks; None: replicated
    decays: bool = True
    seed_name: str | None = None  # name that seeds the initial values; None: ones, or zeros for a bias
    residual_output: bool = False  # the product is added to the residual stream
    present: Callable[[ModelConfig], bool] = lambda model: True  # whether a model has this weight

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Return the shape of the unsharded weight."""
        sizes: dict[Dimension, int] = {
            "vocab": model.vocab_size,
            "hidden": model.hidden_size,
            "intermediate": model.intermediate_size,
            "queries": model.num_attention_heads * model.head_dim,
            "keys": model.num_key_value_heads * model.head_dim,
            "head": model.head_dim,
        }
        return tuple(sizes[dimension] for dimension in self.dimensions)

    def numel(self, model: ModelConfig) -> int:
        """Return the number of elements of the unsharded weight."""
        return prod(self.shape(model))

    def part_shape(self, model: ModelConfig, tp: int) -> tuple[int, ...]:
        """Return the shape on each of `tp` ranks, with the padding of the vocabulary."""
        return tuple(part_rows(n, tp) if dim == self.cut else n for dim, n in enumerate(self.shape(model)))

    def part_numel(self, model: ModelConfig, tp: int) -> int:
        """Return the number of elements on each of `tp` ranks, with the padding of the vocabulary."""
        return prod(self.part_shape(model, tp))

    def own_numel(self, model: ModelConfig, rank: int, tp: int) -> int:
        """Return how many elements of the weight `rank` of `tp` holds; in its memory, padding follows them."""
        if self.cut is None:
            return self.numel(model)
        length = self.shape(model)[self.cut]
        return self.numel(model) // length * len(own_rows(length, rank, tp))


def _norm(name: str) -> Weight:
    return Weight(name, Role.NORM, ("hidden",), cut=None, decays=False)


def _column_parallel(name: str, outputs: Dimension, inputs: Dimension, seed_name: str) -> Weight:
    return Weight(name, Role.HIDDEN_MATRIX, (outputs, inputs), cut=0, seed_name=seed_name)


def _row_parallel(name: str, outputs: Dimension, inputs: Dimension, seed_name: str) -> Weight:
    return Weight(name, Role.HIDDEN_MATRIX, (outputs, inputs), cut=1, seed_name=seed_name, residual_output=True)


def _bias(of: Weight, present: Callable[[ModelConfig], bool]) -> Weight:
    """Return the bias of a matrix, cut like its rows: that of a row-parallel one is added after the reduction."""
    name = of.name.removesuffix(".weight") + BIAS
    return Weight(name, Role.BIAS, of.dimensions[:1], None if of.cut else 0, decays=False, present=present)


def _head_norm(name: str) -> Weight:
    return Weight(name, Role.NORM, ("head",), cut=None, decays=False, present=lambda model: model.qk_norm)


def _has_qkv_bias(model: ModelConfig) -> bool:
    return model.attention_bias != "none"


def _has_output_bias(model: ModelConfig) -> bool:
    return model.attention_bias == "qkvo"


def _has_mlp_bias(model: ModelConfig) -> bool:
    return model.mlp_bias


QUERY = _column_parallel("self_attn.q_proj.weight", "queries", "hidden", "q_proj")
KEY = _column_parallel("self_attn.k_proj.weight", "keys", "hidden", "k_proj")
VALUE = _column_parallel("self_attn.v_proj.weight", "keys", "hidden", "v_proj")
OUTPUT = _row_parallel("self_attn.o_proj.weight", "hidden", "queries", "o_proj")
UP = _column_parallel("mlp.up_proj.weight", "intermediate", "hidden", "up_proj")
DOWN = _row_parallel("mlp.down_proj.weight", "hidden", "intermediate", "down_proj")
GATE = _column_parallel("mlp.gate_proj.weight", "intermediate", "hidden", "gate_proj")
QUERY_NORM = _head_norm("self_attn.q_norm.weight")

EMBEDDING = Weight("weight", Role.EMBEDDING, ("vocab", "hidden"), cut=0, seed_name="embed")
_LAYER = (  # in the order of the modules
    _norm("input_layernorm.weight"),
    *(row for matrix in (QUERY, KEY, VALUE) for row in (matrix, _bias(matrix, _has_qkv_bias))),
    *(OUTPUT, _bias(OUTPUT, _has_output_bias)),
    *(QUERY_NORM, _head_norm("self_attn.k_norm.weight")),
    _norm("post_attention_layernorm.weight"),
    *(row for matrix in (GATE, UP, DOWN) for row in (matrix, _bias(matrix, _has_mlp_bias))),
)
FINAL_NORM = _norm("norm.weight")
HEAD = Weight("lm_head.weight", Role.HEAD, ("vocab", "hidden"), cut=0, seed_name="lm_head")

TABLE = (EMBEDDING, *_LAYER, FINAL_NORM, HEAD)
EMBEDDING_KEY: Key = (0, EMBEDDING.name)
_BY_NAME = {weight.name: weight for weight in TABLE}


@lru_cache(maxsize=1000)  # the planner asks for every layout
def decoder_layer(model: ModelConfig) -> tuple[Weight, ...]:
    """Return the rows of a decoder layer of a model, in the order of the modules."""
    return tuple(weight for weight in _LAYER if weight.present(model))


def weights(model: ModelConfig) -> Iterator[tuple[Key, Weight]]:
    """Yield (key, row) of every weight of a model in layer order; a tied table appears once, as the embedding."""
    layers = model.num_hidden_layers
    yield EMBEDDING_KEY, EMBEDDING
    yield from (((layer, weight.name), weight) for layer in range(1, layers + 1) for weight in decoder_layer(model))
    yield (layers + 1, FINAL_NORM.name), FINAL_NORM
    if not model.tie_word_embeddings:
        yield (layers + 2, HEAD.name), HEAD


def weight_shapes(model: ModelConfig) -> dict[Key, tuple[int, ...]]:
    """Return the unsharded shape of every weight of a model, in layer order."""
    return {key: weight.shape(model) for key, weight in weights(model)}


def bias_of(matrix: Weight, model: ModelConfig) -> Weight | None:
    """Return the row of the bias that a model adds to the product of `matrix`, None without one."""
    bias = _BY_NAME.get(matrix.name.removesuffix(".weight") + BIAS)
    return bias if bias is not None and bias.present(model) else None


def weight_of(name: str) -> Weight:
    """Return the row of a parameter, given its name within its layer or any name that `key_of` accepts."""
    return _BY_NAME[_PREFIX.sub("", name, count=1)]


def key_of(name: str) -> Key:
    """Return the key of a parameter by its name in a DeepSpeed engine: with or without a pipeline, or tied."""
    prefix = _PREFIX.match(name)
    if prefix is None:
        raise ValueError(f"{name} is not the name of a model parameter")
    return int(prefix[1] or 0), name[prefix.end() :]


def held_elements(rows: Iterable[Weight], model: ModelConfig, tp: int) -> Counter[Role]:
    """Return the number of elements of `rows` that each of `tp` ranks holds, by role, with padding."""
    held: Counter[Role] = Counter()
    for weight in rows:
        held[weight.role] += weight.part_numel(model, tp)
    return held


def padding_elements(model: ModelConfig, tp: int) -> int:
    """Return the number of elements of padding that `tp` ranks together hold beside one copy of the model."""
    sharded = (weight for _, weight in weights(model) if weight.cut is not None)
    return sum(weight.part_numel(model, tp) * tp - weight.numel(model) for weight in sharded)
