"""The decoder layer with a key-value cache: the same function of the same weights, for a few tokens behind others.

Shapes: B rows, T new tokens of a row, N = B * T, D hidden size, H query and G key-value heads of this rank, K head
size. There is no autograd, and nothing is compiled, because the shapes change from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llama_ds.model.key_value_cache import KeyValueCache
from llama_ds.model.linear import ShardedLinear, adjacent, column_products, lay_together
from llama_ds.model.pointwise import plain_rms_norm, plain_swiglu

if TYPE_CHECKING:
    from llama_ds.model.decoder import DecoderLayer


def cached_forward(layer: DecoderLayer, x: Tensor, cache: KeyValueCache) -> Tensor:
    """Return the layer's output for the hidden states x of the tokens that `cache.begin` announced: (B, T, D)."""
    attention, mlp = layer.self_attn, layer.mlp
    norm, mid_norm = layer.input_layernorm, layer.post_attention_layernorm
    n = plain_rms_norm(x, norm.weight, norm.eps).flatten(0, 1)
    products = _side_by_side(n, (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = products.view(*x.shape[:2], -1, attention.head_dim)
    queries = layer.context.model.num_attention_heads // layer.tp.size
    groups = layer.context.model.num_key_value_heads // layer.tp.size
    q, k, v = heads.split([queries, groups, groups], 2)
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = (
            plain_rms_norm(heads, norm.weight, norm.eps)
            for heads, norm in ((q, attention.q_norm), (k, attention.k_norm))
        )
    out = cache.attend(layer, cache.rotate(q), cache.rotate(k), v, layer.context.attention.name)
    x = x + attention.o_proj.reduced(attention.o_proj(out.flatten(2)))
    n = plain_rms_norm(x, mid_norm.weight, mid_norm.eps).flatten(0, 1)
    product = plain_swiglu(_side_by_side(n, (mlp.gate_proj, mlp.up_proj)))
    return x + mlp.down_proj.reduced(mlp.down_proj(product.view(*x.shape[:2], -1)))


def _side_by_side(x: Tensor, layers: Sequence[ShardedLinear]) -> Tensor:
    """Return the outputs of column-parallel layers for x (N, I): (N, sum of O). By one product, if that copies nothing.

    Weights that ZeRO-3 partitions are gathered only while their module is called.
    """
    weights = [layer.weight for layer in layers]
    if hasattr(weights[0], "ds_id") or adjacent(weights) is None:
        return torch.cat([layer(x) for layer in layers], -1)
    return column_products(x, layers)


def join_products(model: nn.Module) -> None:
    """Make matrices that share an input adjacent in memory in all decoder layers, so that one product computes them."""
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for part in (part for part in model.modules() if hasattr(part, names[0])):
            weights = [getattr(part, name).weight for name in names]
            if adjacent(weights) is None:
                lay_together(weights)
