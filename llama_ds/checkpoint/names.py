"""Names of weights: (layer index, local name) here and in DeepSpeed's files, dotted names in Hugging Face's.

Layers: 0 embedding, 1 .. L decoder, L + 1 final norm, L + 2 head.
"""

from __future__ import annotations

ROW_PARALLEL = ("o_proj", "down_proj")  # cut along their inputs; the other matrices along their outputs


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
