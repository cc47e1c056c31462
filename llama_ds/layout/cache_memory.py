"""Memory of the key-value cache with which text is generated."""

from __future__ import annotations

from llama_ds.config.schema import ModelConfig


def cache_bytes(model: ModelConfig, layers: int, rows: int, positions: int, tp: int, element_bytes: int) -> int:
    """Return the bytes of the keys and values of `rows` rows of `positions` tokens on one rank.

    Args:
        layers: decoder layers of the rank's stages.
        tp: ranks over which the key-value heads are cut.
        element_bytes: bytes of a number in the dtype of the computation.
    """
    heads = model.num_key_value_heads // tp
    return 2 * layers * rows * positions * heads * model.head_dim * element_bytes
