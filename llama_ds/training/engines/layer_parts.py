"""The parts from which every engine builds its layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from llama_ds.config.context_parallel import cp_sizes
from llama_ds.config.document_marks import DocumentMarks
from llama_ds.config.schema import RunConfig
from llama_ds.layout.layout import Layout
from llama_ds.layout.rank_memory import keeps_fp8_weights
from llama_ds.layout.recompute import stage_policies
from llama_ds.model.decoder import LayerContext
from llama_ds.model.graphs import Graphs
from llama_ds.model.llama import layer_context
from llama_ds.model.loss import NextTokenLoss
from llama_ds.parallel import world
from llama_ds.parallel.grid import context_parallel, own_coords, tensor_parallel
from llama_ds.parallel.trace import Trace


@dataclass(frozen=True)
class LayerParts:
    """The parts of a rank's layers that depend on the run and the device, but not on the engine."""

    context: LayerContext
    loss: NextTokenLoss
    policies: list[str] | None  # save policy of every decoder layer; None: layers by autograd
    dtype: torch.dtype
    trace: Trace
    dp_rank: int  # number of this rank's rows among the data-parallel ranks
    graphs: Graphs | None = None  # makes those of the decoder layers; None: these are eager


def layer_parts(
    run: RunConfig, layout: Layout, dtype: torch.dtype, device: torch.device, marks: DocumentMarks
) -> LayerParts:
    """Create the communicators of a layer and choose the attention backend and each layer's save policy. Collective."""
    trace = Trace(device)
    tp = tensor_parallel(layout, run.parallel.sequence_parallel, trace, run.parallel.tp_chunks)
    cp = context_parallel(layout, cp_sizes(run)[0], trace)
    context = layer_context(run, tp, device.type, dtype, marks, cp, world.maximum_of, keeps_fp8_weights(run, layout))
    context = replace(context, recomputing=partial(trace.around, "recompute"))
    loss = NextTokenLoss(tp, run.optimizer.z_loss, context.weight_gradients, run.model.vocab_size, cp)
    return LayerParts(context, loss, _save_policies(run, layout, dtype), dtype, trace, own_coords(layout).dp)


def _save_policies(run: RunConfig, layout: Layout, dtype: torch.dtype) -> list[str] | None:
    if run.compute.decoder_layer == "autograd":
        return None
    return [policy for stage in stage_policies(run, layout, dtype.itemsize) for policy in stage.policies]
