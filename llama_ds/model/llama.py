"""The complete model as one module, for a single pipeline stage; it defines the layer order for all layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama_ds.config.document_marks import LLAMA_MARKS, DocumentMarks
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.flops import parameter_count
from llama_ds.layout.vocab_parts import own_rows
from llama_ds.model.attention import choose_backend
from llama_ds.model.context_parallel import ContextParallel, WholeRows
from llama_ds.model.cpu_products import choose_products
from llama_ds.model.decoder import DecoderLayer, Ids, LayerContext
from llama_ds.model.embedding import FinalNorm, Head, VocabParallelEmbedding, tied_head
from llama_ds.model.fp8 import Fp8Products, QuantisedWeights, check_capability
from llama_ds.model.fp8_delayed import DelayedProducts
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.model.next_token import own_logits
from llama_ds.model.products import PlainProducts, Products
from llama_ds.model.rope import RotaryTables
from llama_ds.model.shared_rows import attention_over
from llama_ds.model.tensor_parallel import TensorParallel


def layer_context(
    run: RunConfig,
    tp: TensorParallel,
    device_type: str,
    dtype: torch.dtype,
    marks: DocumentMarks = LLAMA_MARKS,
    cp: ContextParallel | None = None,
    agree: Callable[[Tensor], Tensor] = lambda x: x,
    keep_weights: bool = False,
) -> LayerContext:
    """Choose the attention backend, and on a CPU the matrix library, and return the context of a stage's layers.

    `device_type` is torch's: "cpu" or "cuda". The layers compute in `dtype`. `marks` are those of the tokenizer. `cp`
    is the group that shares rows; None: this rank has whole rows. `agree` returns the maxima over all ranks, and
    `keep_weights` says whether those in float8 stay until a step ends, for its micro-batches.
    """
    model, cp = run.model, cp or WholeRows()
    if device_type == "cpu":
        choose_products()
    products: Products = PlainProducts()
    if run.compute.fp8 != "off":
        check_capability(torch.device(device_type), dtype)
        weights = QuantisedWeights(keep_weights)
        products = Fp8Products(tp, weights)
        if run.compute.fp8 == "delayed":
            layers, weight_gradients = model.num_hidden_layers, run.compute.fp8_weight_gradients
            products = DelayedProducts(tp, weights, layers, weight_gradients, agree)
    backend = choose_backend(run.compute.attention_backend, device_type, dtype, model.head_dim)
    return LayerContext(
        model=model,
        seed=run.seed,
        tp=tp,
        attention=attention_over(cp, backend),
        rotary=RotaryTables(model, run.data.seq_len, cp),
        cp=cp,
        document_mask=run.data.document_mask,
        marks=marks,
        initializer_range=run.training.initializer_range,
        products=products,
    )


class Llama(nn.Module):
    """LLaMA on one pipeline stage; parameters are named by global layer index, as DeepSpeed's pipeline names them.

    Layers: 0 embedding, 1 .. L decoder, L + 1 final norm, L + 2 head (absent when tied).
    """

    def __init__(
        self,
        context: LayerContext,
        loss: NextTokenLoss,
        policies: Sequence[str] | None = None,
        checkpointed: bool = False,
    ) -> None:
        """Build all layers.

        Args:
            policies: save policy of each decoder layer, which then has the hand-written backward; None: plain autograd.
            checkpointed: whether layers with plain autograd save only their input and recompute their forward.
        """
        super().__init__()
        model = context.model
        self.context = context
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList()
        self.layers.append(VocabParallelEmbedding(context))
        for i in range(model.num_hidden_layers):
            self.layers.append(ManualBackwardLayer(context, i, policies[i]) if policies else DecoderLayer(context, i))
        self.layers.append(FinalNorm(context))
        if not model.tie_word_embeddings:
            self.layers.append(Head(context))
        self.tied = model.tie_word_embeddings
        self.loss = loss
        self.tp = context.tp

    def forward(self, ids: Ids, labels: Tensor | None = None, last: Tensor | None = None) -> Tensor:
        """Return the loss of ids and labels, each (B, T), or, without labels, this rank's logits (B, T, V / tp).

        Context-parallel ranks take their own tokens' ids and labels, and document_start if documents are masked.
        With `last` (B,), only the logits (B, V / tp) at these positions of the rows.
        """
        layers = list(self.layers)
        embedding = cast(VocabParallelEmbedding, layers[0])
        head = partial(tied_head, embedding) if self.tied else layers.pop()
        _, *decoders, norm = layers
        recompute = self.checkpointed and torch.is_grad_enabled()
        hidden = embedding(ids)
        for layer in decoders:
            # Not as a pair: the hooks that ZeRO-3 puts on a layer find the tensors among its arguments only.
            inputs = hidden if isinstance(hidden, tuple) else (hidden,)
            hidden = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
        then = partial(self._logits, last) if labels is None else lambda x, weight: self.loss((x, weight), labels)
        return cast(Tensor, head(norm(hidden), then))

    @torch.no_grad()
    def logits(self, ids: ArrayLike | Tensor) -> Tensor:
        """Return the next-token logits (B, T, V) of ids (B, T), given as tensor, array or nested lists.

        They have the model's dtype and device and no gradients; `model(ids)` returns logits with gradients.

        Raises:
            UserError: the ids are invalid, or the model is sharded over several ranks.
        """
        if self.tp.size > 1:
            raise UserError(
                f"logits: tp {self.tp.size} cuts the vocabulary; call the model itself for this rank's part"
            )
        return self(self._checked(ids))

    def extra_repr(self) -> str:
        weights, seq_len = list(self.parameters()), self.context.rotary.seq_len
        own = sum(math.prod(getattr(weight, "ds_shape", weight.shape)) for weight in weights)
        part = f", {own:,} on this rank of tp {self.tp.size}" if self.tp.size > 1 else ""
        dtype = str(weights[0].dtype).removeprefix("torch.")
        whole = parameter_count(self.context.model)
        return f"{whole:,} parameters{part}, {dtype} on {weights[0].device}, rows of up to {seq_len} tokens"

    def _checked(self, ids: ArrayLike | Tensor) -> Tensor:
        """Return ids as an int64 tensor on the model's device.

        Raises:
            UserError: they are not integers of the vocabulary, or the rows are longer than the rotary tables.
        """
        limit, vocab = self.context.rotary.seq_len, self.context.model.vocab_size
        try:
            found = ids if isinstance(ids, Tensor) else torch.from_numpy(np.asarray(ids))
        except (ValueError, TypeError) as error:
            raise UserError(f"ids: not rows of one length ({error}); give integers (rows, tokens)") from None
        if found.ndim != 2 or found.is_floating_point() or not 0 < found.shape[1] <= limit:
            raise UserError(
                f"ids: {found.dtype} of shape {list(found.shape)} are not integers (rows, tokens) with 1 to {limit} "
                "tokens in a row, as the model was built for; put a single row into brackets: [ids]"
            )
        found = found.to(next(self.parameters()).device, torch.int64)
        if found.numel() and not 0 <= found.min() <= found.max() < vocab:
            raise UserError(
                f"ids: {int(found.min())} to {int(found.max())} are not all in the vocabulary of {vocab}; "
                "encode the text with the model's own tokenizer"
            )
        return found

    def _logits(self, last: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
        if last is not None:
            return own_logits(x, weight, last, self.context)
        own = own_rows(self.context.model.vocab_size, self.tp.rank, self.tp.size)
        return F.linear(self.tp.enter(x), weight[: len(own)])
