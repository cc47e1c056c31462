"""Parameters and FLOPs per token of a LLaMA model, and the peak FLOP/s of known devices.

Convention: a multiply-add is 2 FLOPs. Only matrix products are counted; norms, biases, rotary embedding, softmax, SiLU
and the embedding lookup are not. A query at position t attends to t + 1 keys, so causal attention counts (T + 1) / 2
keys per query. The backward pass costs twice the forward. Model FLOPs are the same for every layout and recompute
policy; hardware FLOPs add the recomputed ones (`layout/activation_memory.py`). See PaLM (arXiv 2204.02311, appendix B)
and Korthikanti et al. (arXiv 2205.05198, appendix A).
"""

from __future__ import annotations

from functools import lru_cache

from llama_ds.config.schema import ModelConfig
from llama_ds.layout.weights import EMBEDDING, HEAD, Role, decoder_layer, weights

# Dense peaks in FLOP/s (no sparsity) from the vendors' data sheets, by dtype: fp8 sums in fp32. V100 has no bf16.
DEVICE_PEAK_FLOPS: dict[str, dict[str, float]] = {
    "H200": {"bf16": 989.4e12, "fp8": 1978.9e12, "fp32": 66.9e12},
    "H100 PCIe": {"bf16": 756e12, "fp8": 1513e12, "fp32": 51.2e12},
    "H100 NVL": {"bf16": 835.5e12, "fp8": 1671e12, "fp32": 60e12},
    "H100": {"bf16": 989.4e12, "fp8": 1978.9e12, "fp32": 66.9e12},
    "H800": {"bf16": 989.4e12, "fp8": 1978.9e12, "fp32": 66.9e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "A800": {"bf16": 312e12, "fp32": 19.5e12},
    "A40": {"bf16": 149.7e12, "fp32": 37.4e12},
    "A10G": {"bf16": 70e12, "fp32": 35e12},
    "A10": {"bf16": 125e12, "fp32": 31.2e12},
    "L40S": {"bf16": 362e12, "fp8": 733e12, "fp32": 91.6e12},
    "L40": {"bf16": 181e12, "fp8": 362e12, "fp32": 90.5e12},
    "L4": {"bf16": 121e12, "fp8": 242e12, "fp32": 30.3e12},
    "RTX 4090": {"bf16": 165.2e12, "fp8": 330.3e12, "fp32": 82.6e12},
    "RTX 3090": {"bf16": 71e12, "fp32": 35.6e12},
    "V100": {"fp16": 125e12, "fp32": 15.7e12},
}


def layer_parameters(model: ModelConfig) -> int:
    """Return the parameters of one decoder layer: attention, SwiGLU, norms and biases."""
    return sum(weight.numel(model) for weight in decoder_layer(model))


def embedding_parameters(model: ModelConfig) -> int:
    """Return the parameters of the token embedding; the head has as many."""
    return EMBEDDING.numel(model)


def parameter_count(model: ModelConfig) -> int:
    """Return the exact number of parameters; a tied embedding is counted once."""
    return sum(weight.numel(model) for _, weight in weights(model))


def layer_costs(model: ModelConfig, seq_len: int, keys: float | None = None) -> list[float]:
    """Return the forward FLOPs per token of [embedding, decoder layer x L, final norm, head]; see below for `keys`."""
    head = 2.0 * HEAD.numel(model)
    return [0.0, *[layer_forward_flops(model, seq_len, keys)] * model.num_hidden_layers, 0.0, head]


def flops_per_token(model: ModelConfig, seq_len: int, keys: float | None = None) -> float:
    """Return the model FLOPs per token of forward and backward. MFU is this times tokens/s over the peak.

    `keys` is the mean number of tokens that a token sees; None: that of rows of one document.
    """
    return 3 * sum(layer_costs(model, seq_len, keys))


def device_peak(name: str, dtype: str) -> float | None:
    """Return the dense peak in FLOP/s of a device, or None if it is unknown.

    `name` is the result of torch.cuda.get_device_name. `dtype` is fp8, bf16, fp16 or fp32 (without TF32); fp16 has
    the rate of bf16 on devices that support both.
    """
    words = name.upper().replace("-", " ").split()
    for device, peaks in DEVICE_PEAK_FLOPS.items():
        if all(word in words for word in device.upper().split()):
            return peaks.get(dtype, peaks.get("bf16") if dtype == "fp16" else None)
    return None


def layer_forward_flops(model: ModelConfig, seq_len: int, keys: float | None = None) -> float:
    """Return the forward FLOPs per token of one decoder layer, including QK^T and PV."""
    keys = (seq_len + 1) / 2 if keys is None else keys
    attention = 2 * (2 * model.num_attention_heads * model.head_dim * keys)
    return 2 * _matrix_parameters(model) + attention


@lru_cache(maxsize=1000)  # the planner calls this for every layout
def _matrix_parameters(model: ModelConfig) -> int:
    return sum(weight.numel(model) for weight in decoder_layer(model) if weight.role is Role.HIDDEN_MATRIX)
