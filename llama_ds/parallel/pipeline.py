"""The model as DeepSpeed's PipelineModule: the same layers as `llama_ds.model.llama.Llama`, split into stages."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

from llama_ds.config.schema import RunConfig
from llama_ds.layout.layout import Layout
from llama_ds.layout.partition import stage_boundaries
from llama_ds.layout.weights import EMBEDDING, TIED_TABLE
from llama_ds.model.decoder import DecoderLayer, LayerContext
from llama_ds.model.embedding import FinalNorm, Head, VocabParallelEmbedding, tied_head
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.parallel.grid import neighbour_groups, topology
from llama_ds.schedules.instructions import Placement


class LlamaPipeline(PipelineModule):
    """Embedding, decoder layers, final norm and head as layer specs, split according to `parallel.partition`.

    A rank holds one or more stages, its chunks; `forward` runs the chunk that `activate` selected last.
    """

    def __init__(
        self,
        run: RunConfig,
        layout: Layout,
        placement: Placement,
        context: LayerContext,
        loss: nn.Module,
        policies: Sequence[str] | None,
    ) -> None:
        """`policies` are the decoder layers' save policies; None: layers with plain autograd."""
        self._bounds = stage_boundaries(run)
        self._placement = placement
        self.chunks: list[list[Any]] = []
        super().__init__(
            layers=layer_specs(context, policies, self._bounds),
            topology=topology(layout),
            loss_fn=loss,
            activation_checkpoint_interval=1 if policies is None and run.parallel.recompute == "full" else 0,
            checkpointable_layers=[DecoderLayer.__name__],
        )
        near = run.parallel.gradient_neighbours
        self.near_first = neighbour_groups(layout, near) if near > 1 else None  # for the reduction of gradients

    def activate(self, chunk: int) -> None:
        """Select the chunk that this module's forward, saving and loading apply to."""
        self.forward_funcs = self.chunks[chunk]
        self._set_bounds(*self._chunk_bounds(chunk))
        if self.activation_checkpoint_interval > 0:
            self.is_checkpointable_results = [self._is_checkpointable([layer]) for layer in self.forward_funcs]

    def numbered_layers(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield this rank's layers with their indices in the full model, without a tied head, which is a function."""
        for chunk, layers in enumerate(self.chunks):
            for index, layer in enumerate(layers, self._chunk_bounds(chunk)[0]):
                if isinstance(layer, nn.Module):
                    yield index, layer

    def stage_owner(self, layer_idx: int) -> int:
        """Return the pipeline rank that holds a layer."""
        return self._placement.home(bisect_right(self._bounds, layer_idx) - 1)[0]

    def save_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Write this rank's share of its chunks' layers."""
        for chunk in range(len(self.chunks)):
            self.activate(chunk)
            super().save_state_dict(*args, **kwargs)

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        super()._synchronize_tied_weights()  # a broadcast, about which autograd would warn

    def _chunk_bounds(self, chunk: int) -> tuple[int, int]:
        stage = self._placement.stage(self.stage_id, chunk)
        return self._bounds[stage], self._bounds[stage + 1]

    def _partition_layers(self, method: Any = None) -> None:
        # DeepSpeed's own methods balance layers, or parameters, for which they build every layer on every rank.
        self.parts = self._bounds

    def _build(self) -> None:
        for chunk in range(self._placement.chunks):
            self._set_bounds(*self._chunk_bounds(chunk))
            self.forward_funcs = []
            super()._build()
            self.chunks.append(self.forward_funcs)
        self.activate(0)


def layer_specs(context: LayerContext, policies: Sequence[str] | None, bounds: Sequence[int]) -> list[LayerSpec]:
    """Return the layers in order; their indices name the parameters in checkpoints."""
    model = context.model
    decoders = [
        LayerSpec(ManualBackwardLayer, context, i, policies[i], first=1 + i in bounds[1:])
        if policies
        else LayerSpec(DecoderLayer, context, i)
        for i in range(model.num_hidden_layers)
    ]
    norm = LayerSpec(FinalNorm, context)
    if not model.tie_word_embeddings:
        return [LayerSpec(VocabParallelEmbedding, context), *decoders, norm, LayerSpec(Head, context)]
    table, attribute = (TIED_TABLE, VocabParallelEmbedding, context), EMBEDDING.name
    first = TiedLayerSpec(*table, tied_weight_attr=attribute)
    last = TiedLayerSpec(*table, forward_fn=tied_head, tied_weight_attr=attribute)
    return [first, *decoders, norm, last]
