"""The decoder layer with a key-value cache: the same function of the same weights, for a few tokens behind others.

Shapes: B rows, T new tokens of a row, N = B * T, D hidden size, H query and G key-value heads of this rank, K head
size. There is no autograd, and nothing is compiled, because the shapes change from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ds.model.key_value_cache import LayerCache
from llama_ds.model.linear import RMSNorm, ShardedLinear, adjacent, lay_together
from llama_ds.model.pointwise import plain_swiglu

if TYPE_CHECKING:
    from llama_ds.model.decoder import DecoderLayer


def cached_forward(layer: DecoderLayer, x: Tensor, cache: LayerCache) -> Tensor:
    """Return the layer's output for the hidden states x of the tokens that `cache.begin` announced: (B, T, D)."""
    attention, mlp = layer.self_attn, layer.mlp
    norm, mid_norm = layer.input_layernorm, layer.post_attention_layernorm
    n = _normed(x, norm).flatten(0, 1)
    products = _side_by_side(n, (attention.q_proj, attention.k_proj, attention.v_proj), cache)
    heads = products.view(*x.shape[:2], -1, attention.head_dim)
    queries = layer.context.model.num_attention_heads // layer.tp.size
    groups = layer.context.model.num_key_value_heads // layer.tp.size
    both, v = heads.split([queries + groups, groups], 2)
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = both.split([queries, groups], 2)
        both = torch.cat([_normed(q, attention.q_norm), _normed(k, attention.k_norm)], 2)
    q, k = cache.rotate(both).split([queries, groups], 2)
    out = cache.attend(layer, q, k, v, layer.context.attention.name)
    x = x + attention.o_proj.reduced(attention.o_proj(out.flatten(2)))
    n = _normed(x, mid_norm).flatten(0, 1)
    product = plain_swiglu(_side_by_side(n, (mlp.gate_proj, mlp.up_proj), cache))
    return x + mlp.down_proj.reduced(mlp.down_proj(product.view(*x.shape[:2], -1)))


def _normed(x: Tensor, norm: RMSNorm) -> Tensor:
    """Return norm(x) by one call, whose parts cost less than those of `RMSNorm`."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _side_by_side(x: Tensor, layers: Sequence[ShardedLinear], cache: LayerCache) -> Tensor:
    """Return the outputs of column-parallel layers for x (N, I): (N, sum of O); by one product if it copies nothing."""
    if layers[0] not in cache.joined:
        cache.joined[layers[0]] = _joined(layers)
    joined = cache.joined[layers[0]]
    if joined is None:
        return torch.cat([layer(x) for layer in layers], -1)
    weight, bias = joined
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _joined(layers: Sequence[ShardedLinear]) -> tuple[Tensor, Tensor | None] | None:
    """Return the matrices (I, sum of O) and biases of layers as one; None: they are not adjacent.

    Weights that ZeRO-3 partitions are gathered only while their module is called. Others stay where they are while a
    text is generated.
    """
    weights = [layer.weight for layer in layers]
    view = None if hasattr(weights[0], "ds_id") else adjacent(weights)
    if view is None:
        return None
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    return view.t(), torch.cat(biases) if biases else None


def join_products(model: nn.Module) -> None:
    """Make matrices that share an input adjacent in memory in all decoder layers, so that one product computes them."""
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for part in (part for part in model.modules() if hasattr(part, names[0])):
            weights = [getattr(part, name).weight for name in names]
            if adjacent(weights) is None:
                lay_together(weights)
