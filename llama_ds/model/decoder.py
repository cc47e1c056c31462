"""The decoder layer with plain autograd: pre-norm attention and SwiGLU with residuals (LLaMA paper, section 2.2).

Shapes: B rows, T tokens of a row, D hidden size, F intermediate size, H query and G key-value heads of the whole model,
K head size, tp ranks; S = T / tp under sequence parallelism, else T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from llama_ds.config.document_marks import LLAMA_MARKS, DocumentMarks
from llama_ds.config.schema import ModelConfig, TrainingConfig
from llama_ds.layout.mup import initial_factor
from llama_ds.layout.weights import Weight, bias_of, weight_of
from llama_ds.model.attention import CausalAttention
from llama_ds.model.cached_layer import cached_forward
from llama_ds.model.chunked_products import GathersAhead
from llama_ds.model.context_parallel import ContextParallel, WholeRows, rows_of_its_own
from llama_ds.model.init import initial_shard
from llama_ds.model.key_value_cache import CacheHolder
from llama_ds.model.linear import RMSNorm, ShardedLinear
from llama_ds.model.products import PlainProducts, Products
from llama_ds.model.rope import RotaryTables, rotate
from llama_ds.model.tensor_parallel import TensorParallel, no_sequence_parallel
from llama_ds.model.weight_gradients import WeightGradients

Hidden = Tensor | tuple[Tensor, Tensor]  # (B, S, D), paired with document_start (B, T) if documents are masked
# This rank's ids of rows (B, T / cp), paired with document_start if it cannot be read off them.
Ids = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LayerContext:
    """Everything that the layers of one stage share: configuration, communicator, kernels and tables."""

    model: ModelConfig
    seed: int
    tp: TensorParallel
    attention: CausalAttention
    rotary: RotaryTables
    cp: ContextParallel = field(default_factory=WholeRows)
    document_mask: bool = False
    marks: DocumentMarks = LLAMA_MARKS  # the ids between documents, for the mask
    initializer_range: float = TrainingConfig.initializer_range  # standard deviation of initial weights
    products: Products = field(default_factory=PlainProducts)  # for the hand-written backward
    weight_gradients: WeightGradients = field(default_factory=WeightGradients)
    gathers_ahead: GathersAhead = field(default_factory=GathersAhead)
    recomputing: Callable[[], AbstractContextManager[None]] = nullcontext  # wraps the recompute of a layer
    caches: CacheHolder = field(default_factory=CacheHolder)  # for the generation of text

    @contextmanager
    def whole_rows(self) -> Iterator[None]:
        """Let every rank hold all tokens of its rows inside, as the layers with a cache need it.

        Context-parallel ranks then have rows of their own, like data-parallel ones; tensor-parallel ranks share theirs.
        """
        with no_sequence_parallel(self.tp), rows_of_its_own(self.cp):
            yield

    @contextmanager
    def products_of_the_run(self) -> Iterator[None]:
        """Let layers multiply in the dtype of the run inside, whatever `compute.fp8` says of training."""
        before = self.products
        vars(self)["products"] = PlainProducts()
        try:
            yield
        finally:
            vars(self)["products"] = before

    def parameter(self, weight: Weight, layer: int = 0) -> nn.Parameter:
        """Return this rank's shard of a weight with its initial values, which depend on `layer` except for norms.

        Matrices that write to the residual stream start smaller by a factor sqrt(2 L) (GPT-2, section 2.3), so that
        its variance does not grow with depth. muP has a factor for hidden matrices.
        """
        std = self.initializer_range * initial_factor(weight.role, self.model)
        if weight.residual_output:
            std /= (2 * self.model.num_hidden_layers) ** 0.5
        tp = self.tp
        parameter = nn.Parameter(initial_shard(weight, self.model, tp.rank, tp.size, std, self.seed, layer))
        if tp.size > 1 and weight.cut is not None:
            # Tells DeepSpeed that tensor-parallel ranks hold different shards, so each one enters the gradient norm.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        return parameter

    def linear(self, name: str, layer: int) -> ShardedLinear:
        """Return the linear layer called `name` within decoder layer `layer`."""
        weight = weight_of(f"{name}.weight")
        bias = bias_of(weight, self.model)
        offsets = None if bias is None else self.parameter(bias)
        shard, whole = self.parameter(weight, layer), weight.shape(self.model)
        return ShardedLinear(shard, weight.cut, self.tp, offsets, whole, (layer, name))

    def norm(self, name: str, of_heads: bool = False) -> RMSNorm:
        """Return the norm called `name` within its layer."""
        return RMSNorm(self.parameter(weight_of(f"{name}.weight")), self.model.rms_norm_eps, self.tp, of_heads)


class Attention(nn.Module):
    """x -> W_o attention(rope(W_q x), rope(W_k x), W_v x) with this rank's heads.

    With biases it is W x + b; with norms of queries and keys each head passes one before rope.
    """

    def __init__(self, context: LayerContext, layer: int) -> None:
        super().__init__()
        self.context = context
        self.head_dim = context.model.head_dim
        self.q_proj = context.linear("self_attn.q_proj", layer)
        self.k_proj = context.linear("self_attn.k_proj", layer)
        self.v_proj = context.linear("self_attn.v_proj", layer)
        self.o_proj = context.linear("self_attn.o_proj", layer)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if context.model.qk_norm:
            self.q_norm = context.norm("self_attn.q_norm", of_heads=True)
            self.k_norm = context.norm("self_attn.k_norm", of_heads=True)

    def forward(self, x: Tensor, document_start: Tensor | None) -> Tensor:
        """(B, T, D) -> partial sums (B, T, D)."""
        heads = (-1, self.head_dim)
        tables = self.context.rotary.on(x.device, x.shape[1])
        q, k, v = (linear(x).unflatten(-1, heads) for linear in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm.plain(q), self.k_norm.plain(k)
        q = rotate(q, tables)  # (B, T, H / tp, K)
        k = rotate(k, tables)  # (B, T, G / tp, K)
        return self.o_proj(self.context.attention(q, k, v, document_start).flatten(2))

    def extra_repr(self) -> str:
        model, tp = self.context.model, self.context.tp
        own = f", 1 / {tp.size} of them on this rank" if tp.size > 1 else ""
        return (
            f"{model.num_attention_heads} query and {model.num_key_value_heads} key-value heads of {self.head_dim}{own}"
        )


class SwiGLU(nn.Module):
    """x -> W_down (silu(W_gate x) * W_up x) with this rank's shard of the F intermediate features (Shazeer 2020)."""

    def __init__(self, context: LayerContext, layer: int) -> None:
        super().__init__()
        self.gate_proj = context.linear("mlp.gate_proj", layer)
        self.up_proj = context.linear("mlp.up_proj", layer)
        self.down_proj = context.linear("mlp.down_proj", layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> partial sums (B, T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """h = x + attention(norm(x)); y = h + swiglu(norm(h))."""

    def __init__(self, context: LayerContext, layer: int) -> None:
        super().__init__()
        self.context = context
        self.tp = context.tp
        self.input_layernorm = context.norm("input_layernorm")
        self.self_attn = Attention(context, layer)
        self.post_attention_layernorm = context.norm("post_attention_layernorm")
        self.mlp = SwiGLU(context, layer)

    def forward(self, inputs: Hidden, document_start: Tensor | None = None) -> Hidden:
        """(B, S, D) -> (B, S, D); document_start, if given as an argument or in a pair, is passed along."""
        x, document_start = inputs if isinstance(inputs, tuple) else (inputs, document_start)
        if self.context.caches.cache is not None:
            return cached_forward(self, x, self.context.caches.cache)
        tp, attention, mlp = self.tp, self.self_attn, self.mlp
        x = x + attention.o_proj.reduced(attention(tp.enter(self.input_layernorm.plain(x)), document_start))
        x = x + mlp.down_proj.reduced(mlp(tp.enter(self.post_attention_layernorm.plain(x))))
        return x if document_start is None else (x, document_start)
