"""The whole model as one module, for a single pipeline stage; and the order of its layers, for any number of stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama_ds.config.schema import RunConfig
from llama_ds.model.attention import CausalAttention, choose_backend
from llama_ds.model.cpu_products import choose_products
from llama_ds.model.decoder import DecoderLayer, Shared
from llama_ds.model.embedding import FinalNorm, Head, VocabParallelEmbedding, tied_head
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.rope import RotaryTables
from llama_ds.model.tensor_parallel import TensorParallel
from llama_ds.model.written_out import WrittenOutLayer


def shared_parts(run: RunConfig, tp: TensorParallel, device_type: str, dtype: torch.dtype) -> Shared:
    """Choose the attention backend, and on a CPU who multiplies, and build what the layers of a stage share."""
    model = run.model
    if device_type == "cpu":
        choose_products()
    backend = choose_backend(run.compute.attention_backend, device_type, dtype, model.head_dim)
    return Shared(
        model=model,
        seed=run.seed,
        tp=tp,
        attention=CausalAttention(backend),
        rotary=RotaryTables(model, run.data.seq_len),
        document_mask=run.data.document_mask,
        initializer_range=run.training.initializer_range,
    )


class Llama(nn.Module):
    """LLaMA on one pipeline stage; parameters are named by global layer index, as DeepSpeed's pipeline names them.

    Layers: 0 embedding, 1 .. L decoder, L + 1 final norm, L + 2 head (absent when tied).
    """

    def __init__(
        self,
        shared: Shared,
        loss: NextTokenLoss,
        policies: Sequence[str] | None = None,
        checkpointed: bool = False,
    ) -> None:
        """Build all layers: written out with a save policy each, or by autograd (None), checkpointed or not."""
        super().__init__()
        model = shared.model
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList()
        self.layers.append(VocabParallelEmbedding(shared))
        for i in range(model.num_hidden_layers):
            self.layers.append(WrittenOutLayer(shared, i, policies[i]) if policies else DecoderLayer(shared, i))
        self.layers.append(FinalNorm(shared))
        if not model.tie_word_embeddings:
            self.layers.append(Head(shared))
        self.tied = model.tie_word_embeddings
        self.loss = loss
        self.tp = shared.tp

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss of ids and labels, each (B, T), or without labels this rank's logits (B, T, V / tp)."""
        layers = list(self.layers)
        embedding = cast(VocabParallelEmbedding, layers[0])
        head = partial(tied_head, embedding) if self.tied else layers.pop()
        _, *decoders, norm = layers
        recompute = self.checkpointed and torch.is_grad_enabled()
        hidden = embedding(ids)
        for layer in decoders:
            hidden = checkpoint(layer, hidden, use_reentrant=False) if recompute else layer(hidden)
        then = self._logits if labels is None else lambda x, weight: self.loss((x, weight), labels)
        return cast(Tensor, head(norm(hidden), then))

    def _logits(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(self.tp.enter(x), weight)
