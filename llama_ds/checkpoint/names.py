"""Names and shapes of a model's weights: (layer index, local name) here and in DeepSpeed's files.

Layers: 0 embedding, 1 .. L decoder, L + 1 final norm, L + 2 head (none where it is tied to the embedding).
Shapes: V vocabulary, D hidden size, F intermediate size, H heads, G key-value heads, K head size.
"""

from __future__ import annotations

import re

from llama_ds.config.schema import ModelConfig

Key = tuple[int, str]
ROW_PARALLEL = ("o_proj", "down_proj")  # cut along their inputs; the other matrices along their outputs
TIED = "tied_modules.embed."  # a tied table's name in DeepSpeed's pipeline


def weight_shapes(model: ModelConfig) -> dict[Key, tuple[int, ...]]:
    """Return the whole shape of every weight of a model, in the order of its layers."""
    width, inner, vocabulary, layers = (
        model.hidden_size,
        model.intermediate_size,
        model.vocab_size,
        model.num_hidden_layers,
    )
    heads, groups = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    decoder = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (heads, width),
        "self_attn.k_proj.weight": (groups, width),
        "self_attn.v_proj.weight": (groups, width),
        "self_attn.o_proj.weight": (width, heads),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }
    shapes: dict[Key, tuple[int, ...]] = {(0, "weight"): (vocabulary, width)}
    shapes.update({(i, name): shape for i in range(1, layers + 1) for name, shape in decoder.items()})
    shapes[layers + 1, "norm.weight"] = (width,)
    if not model.tie_word_embeddings:
        shapes[layers + 2, "lm_head.weight"] = (vocabulary, width)
    return shapes


def key_of(name: str) -> Key:
    """Return (layer, local name) of a parameter as a DeepSpeed engine names it: with one stage, in a pipeline, tied."""
    if name.startswith(TIED):
        return 0, name.removeprefix(TIED)
    layer, local = re.fullmatch(r"(?:layers\.)?(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
    return int(layer), local


def hf_name(layer: int, name: str, num_hidden_layers: int) -> str:
    """Return the name transformers' LlamaForCausalLM gives to weight `name` of layer `layer`."""
    if layer == 0:
        return f"model.embed_tokens.{name}"
    if layer <= num_hidden_layers:
        return f"model.layers.{layer - 1}.{name}"
    return f"model.{name}" if layer == num_hidden_layers + 1 else name


def sharded_dim(name: str) -> int | None:
    """Return the dimension along which tensor-parallel ranks cut a weight, or None where each holds it whole."""
    owner = name.split(".")[-2] if "." in name else name
    if "norm" in owner:
        return None
    return 1 if owner in ROW_PARALLEL else 0
