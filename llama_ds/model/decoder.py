"""The decoder layer by plain autograd: pre-norm attention and SwiGLU with residuals (LLaMA paper, section 2.2).

Shapes: B rows, T tokens of a row, D hidden size, F intermediate size, H query and G key-value heads of the whole model,
K head size, tp ranks; S = T / tp under sequence parallelism, else T.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from llama_ds.config.schema import ModelConfig, TrainingConfig
from llama_ds.model.attention import CausalAttention
from llama_ds.model.linear import COLUMNS, ROWS, RMSNorm, ShardedLinear, WeightKey
from llama_ds.model.rope import RotaryTables, rotate
from llama_ds.model.tensor_parallel import TensorParallel
from llama_ds.model.weight_gradients import WeightGradients

Hidden = Tensor | tuple[Tensor, Tensor]  # (B, S, D), with document_start (B, T) beside it where documents are masked


@dataclass(frozen=True)
class Shared:
    """What the layers of one stage share: configuration, communicator, kernels and tables."""

    model: ModelConfig
    seed: int
    tp: TensorParallel
    attention: CausalAttention
    rotary: RotaryTables
    document_mask: bool = False
    initializer_range: float = TrainingConfig.initializer_range  # standard deviation of initial weights
    weight_gradients: WeightGradients = field(default_factory=WeightGradients)
    recomputing: Callable[[], AbstractContextManager[None]] = nullcontext  # around a layer that is run again

    def key(self, layer: int, *, residual_output: bool = False) -> WeightKey:
        """Return where a weight of `layer` starts from.

        Matrices that write to the residual stream start smaller by sqrt(2 L) (GPT-2, section 2.3), so that its
        variance does not grow with depth.
        """
        std = self.initializer_range
        if residual_output:
            std /= (2 * self.model.num_hidden_layers) ** 0.5
        return WeightKey(self.seed, layer, std)


class Attention(nn.Module):
    """x -> W_o attention(rope(W_q x), rope(W_k x), W_v x) with this rank's heads."""

    def __init__(self, shared: Shared, layer: int) -> None:
        super().__init__()
        model, tp = shared.model, shared.tp
        self.shared = shared
        self.head_dim = model.head_dim
        hidden, queries = model.hidden_size, model.num_attention_heads * model.head_dim
        keys = model.num_key_value_heads * model.head_dim
        key = shared.key(layer)
        self.q_proj = ShardedLinear(queries, hidden, ROWS, "q_proj", key, tp)
        self.k_proj = ShardedLinear(keys, hidden, ROWS, "k_proj", key, tp)
        self.v_proj = ShardedLinear(keys, hidden, ROWS, "v_proj", key, tp)
        self.o_proj = ShardedLinear(hidden, queries, COLUMNS, "o_proj", shared.key(layer, residual_output=True), tp)

    def forward(self, x: Tensor, document_start: Tensor | None) -> Tensor:
        """(B, T, D) -> partial sums (B, T, D)."""
        heads = (-1, self.head_dim)
        tables = self.shared.rotary.on(x.device)
        q = rotate(self.q_proj(x).unflatten(-1, heads), tables)  # (B, T, H / tp, K)
        k = rotate(self.k_proj(x).unflatten(-1, heads), tables)  # (B, T, G / tp, K)
        v = self.v_proj(x).unflatten(-1, heads)
        return self.o_proj(self.shared.attention(q, k, v, document_start).flatten(2))

    def extra_repr(self) -> str:
        model, tp = self.shared.model, self.shared.tp
        own = f", 1 / {tp.size} of them on this rank" if tp.size > 1 else ""
        return (
            f"{model.num_attention_heads} query and {model.num_key_value_heads} key-value heads of {self.head_dim}{own}"
        )


class SwiGLU(nn.Module):
    """x -> W_down (silu(W_gate x) * W_up x) with this rank's part of the F intermediate features (Shazeer 2020)."""

    def __init__(self, shared: Shared, layer: int) -> None:
        super().__init__()
        model, tp = shared.model, shared.tp
        hidden, inner = model.hidden_size, model.intermediate_size
        self.gate_proj = ShardedLinear(inner, hidden, ROWS, "gate_proj", shared.key(layer), tp)
        self.up_proj = ShardedLinear(inner, hidden, ROWS, "up_proj", shared.key(layer), tp)
        self.down_proj = ShardedLinear(hidden, inner, COLUMNS, "down_proj", shared.key(layer, residual_output=True), tp)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> partial sums (B, T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """h = x + attention(norm(x)); y = h + swiglu(norm(h))."""

    def __init__(self, shared: Shared, layer: int) -> None:
        super().__init__()
        model = shared.model
        self.shared = shared
        self.tp = shared.tp
        self.input_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps, shared.tp)
        self.self_attn = Attention(shared, layer)
        self.post_attention_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps, shared.tp)
        self.mlp = SwiGLU(shared, layer)

    def forward(self, inputs: Hidden) -> Hidden:
        """(B, S, D) -> (B, S, D), with document_start passed along where it is given."""
        x, document_start = inputs if isinstance(inputs, tuple) else (inputs, None)
        tp = self.tp
        x = x + tp.leave(self.self_attn(tp.enter(self.input_layernorm.plain(x)), document_start))
        x = x + tp.leave(self.mlp(tp.enter(self.post_attention_layernorm.plain(x))))
        return x if document_start is None else (x, document_start)
