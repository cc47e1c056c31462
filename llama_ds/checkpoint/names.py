"""Names of weights at Hugging Face, of which this project's local names are a part."""

from __future__ import annotations


def hf_name(layer: int, name: str, num_hidden_layers: int) -> str:
    """Return the name transformers' LlamaForCausalLM gives to weight `name` of layer `layer`."""
    if layer == 0:
        return f"model.embed_tokens.{name}"
    if layer <= num_hidden_layers:
        return f"model.layers.{layer - 1}.{name}"
    return f"model.{name}" if layer == num_hidden_layers + 1 else name
