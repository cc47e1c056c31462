"""Hugging Face's names of weights. Each contains this project's local name."""

from __future__ import annotations


def hf_name(layer: int, name: str, num_hidden_layers: int) -> str:
    """Return the name of weight `name` of layer `layer` in transformers' LlamaForCausalLM."""
    if layer == 0:
        return f"model.embed_tokens.{name}"
    if layer <= num_hidden_layers:
        return f"model.layers.{layer - 1}.{name}"
    return f"model.{name}" if layer == num_hidden_layers + 1 else name
