"""The model as DeepSpeed's PipelineModule: the same layers as `llama_ds.model.llama.Llama`, cut over stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

from llama_ds.config.layout import Layout
from llama_ds.config.schema import RunConfig
from llama_ds.model.decoder import DecoderLayer, Shared
from llama_ds.model.embedding import FinalNorm, Head, VocabParallelEmbedding, tied_head
from llama_ds.model.written_out import WrittenOutLayer
from llama_ds.parallel.grid import topology
from llama_ds.parallel.partition import boundaries


class LlamaPipeline(PipelineModule):
    """Embedding, decoder layers, final norm and head as layer specs, cut where `parallel.partition` says."""

    def __init__(
        self, run: RunConfig, layout: Layout, shared: Shared, loss: nn.Module, policies: Sequence[str] | None
    ) -> None:
        """`policies` are the decoder layers' save policies; None: layers by autograd."""
        self._stage_bounds = boundaries(run.model, run.data.seq_len, layout.pp, run.parallel.partition)
        super().__init__(
            layers=layer_specs(shared, policies, self._stage_bounds),
            topology=topology(layout),
            loss_fn=loss,
            activation_checkpoint_interval=1 if policies is None and run.parallel.recompute == "full" else 0,
            checkpointable_layers=[DecoderLayer.__name__],
        )

    def _partition_layers(self, method: Any = None) -> None:
        # DeepSpeed's own methods count parameters, by building every layer on every rank, or layers.
        self.parts = self._stage_bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])


def layer_specs(shared: Shared, policies: Sequence[str] | None, bounds: Sequence[int]) -> list[LayerSpec]:
    """Return the layers in order; their indices name the parameters in checkpoints."""
    model = shared.model
    decoders = [
        LayerSpec(WrittenOutLayer, shared, i, policies[i], first=1 + i in bounds[1:])
        if policies
        else LayerSpec(DecoderLayer, shared, i)
        for i in range(model.num_hidden_layers)
    ]
    norm = LayerSpec(FinalNorm, shared)
    if not model.tie_word_embeddings:
        return [LayerSpec(VocabParallelEmbedding, shared), *decoders, norm, LayerSpec(Head, shared)]
    first = TiedLayerSpec("embed", VocabParallelEmbedding, shared, tied_weight_attr="weight")
    last = TiedLayerSpec("embed", VocabParallelEmbedding, shared, forward_fn=tied_head, tied_weight_attr="weight")
    return [first, *decoders, norm, last]
