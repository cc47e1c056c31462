"""Counts of parameters and FLOPs, against transformers' model, a hand count and published numbers."""

from __future__ import annotations

import pytest

from llama_ds.config.schema import ModelConfig
from llama_ds.layout.flops import (
    device_peak,
    embedding_parameters,
    flops_per_token,
    layer_costs,
    layer_parameters,
    parameter_count,
)

LLAMA_65B = ModelConfig(32000, 8192, 22016, 80, 64, 64, 128)
GQA = ModelConfig(512, 64, 96, 3, 8, 2, 16)  # heads wider than hidden / heads
TIED = ModelConfig(512, 64, 96, 3, 8, 8, 8, tie_word_embeddings=True)


@pytest.mark.parametrize("model", [GQA, TIED], ids=["gqa", "tied"])
def test_parameters_are_those_of_transformers(model: ModelConfig) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "tie_word_embeddings")  # fmt: skip
    reference = LlamaForCausalLM(LlamaConfig(**{key: getattr(model, key) for key in keys}))
    assert parameter_count(model) == sum(p.numel() for p in reference.parameters())
    assert layer_parameters(model) == sum(p.numel() for p in reference.model.layers[0].parameters())
    assert embedding_parameters(model) == reference.model.embed_tokens.weight.numel()


def test_flops_by_hand() -> None:
    """One layer of GQA, sequence of 3: every query sees (1 + 2 + 3) / 3 = 2 keys on average."""
    q, k, v, o = 64 * 128, 64 * 32, 64 * 32, 128 * 64
    layer = 2 * (q + k + v + o + 3 * 64 * 96) + 2 * (2 * 8 * 16 * 2)
    assert layer_costs(GQA, 3) == [0, layer, layer, layer, 0, 2 * 64 * 512]
    assert flops_per_token(GQA, 3) == 3 * (3 * layer + 2 * 64 * 512)


def test_matrices_alone_are_6_flops_per_parameter() -> None:
    """PaLM's 6 N (arXiv 2204.02311, appendix B), N without the embedding; attention at 65B and 2k adds 2 percent."""
    matrices = parameter_count(LLAMA_65B) - embedding_parameters(LLAMA_65B) - 161 * 8192
    attention = 6 * 2 * 80 * 8192 * 2049 / 2
    assert flops_per_token(LLAMA_65B, 2048) == pytest.approx(6 * matrices + attention, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100 80GB PCIe", "bf16", 312e12),
        ("NVIDIA A800-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "bf16", 989.4e12),
        ("NVIDIA H200", "fp16", 989.4e12),
        ("NVIDIA H200", "fp32", 66.9e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA A10G", "bf16", 70e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA GeForce RTX 3090", "bf16", 71e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("Tesla V100-SXM2-32GB", "fp16", 125e12),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("AMD EPYC 7763", "bf16", None),
        ("", "bf16", None),
    ],
)
def test_device_peak(name: str, dtype: str, peak: float | None) -> None:
    assert device_peak(name, dtype) == peak
