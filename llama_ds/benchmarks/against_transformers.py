"""Layers and training steps of llama_ds and transformers with the same weights, timed in turns by `step.py`."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llama_ds.benchmarks.layer import LayerContestant
from llama_ds.benchmarks.step import Step, Timing, gemm_step, training_step, with_matmul_precision
from llama_ds.checkpoint.formats.hf_config import hf_config
from llama_ds.checkpoint.names import hf_name
from llama_ds.checkpoint.weights import DTYPES
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import Layout
from llama_ds.layout.weights import HEAD
from llama_ds.model.attention import flash_module
from llama_ds.model.decoder import DecoderLayer
from llama_ds.model.llama import Llama, layer_context
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.model.tensor_parallel import SingleRank
from llama_ds.parallel import world
from llama_ds.training.engines.build import build_engine
from llama_ds.training.engines.optimizer_groups import build_optimizer, decay_groups

LEARNING_RATE = 1e-4
_FP8: dict[str, dict[str, Any]] = {  # settings of `compute`
    "fp8_current": {"fp8": "current"},
    "fp8_delayed": {"fp8": "delayed"},
    "fp8_delayed_all": {"fp8": "delayed", "fp8_weight_gradients": True},
}
_LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # absolute, on the initial weights
_GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, for the norms of input gradients


def layers(
    run: RunConfig, policy: str, device: torch.device, dtype: torch.dtype, fp8: bool = False, compiled: bool = False
) -> tuple[dict[str, LayerContestant], str]:
    """Return the layers to time, with the same weights, and the attention implementation used by transformers.

    Our layers save all activations (`none`) or follow `policy`; with `fp8` there are ours with products in float8, too.
    Their layer uses torch's default matmul precision, and on a CPU also ours; with `compiled` it also runs under
    torch.compile.

    Raises:
        UserError: the layer is not one of transformers' Llama.
    """
    torch_default = torch.get_float32_matmul_precision()
    context = layer_context(run, SingleRank(), device.type, dtype)
    tables = context.rotary.on(device)
    reference = DecoderLayer(context, 0).to(device, dtype)
    policies = dict.fromkeys(("none", policy))  # without duplicates, in this order
    ours = {kept: ManualBackwardLayer(context, 0, kept).to(device, dtype) for kept in policies}
    for manual_layer in ours.values():
        manual_layer.load_state_dict(reference.state_dict())
        manual_layer.lay_weights_together()  # as in DeepSpeed's flat buffers
    settings = hf_config(run.model, run.data.seq_len, str(dtype).removeprefix("torch."))
    if settings["model_type"] != LlamaConfig.model_type:
        raise UserError(
            f"model: transformers' {settings['model_type']} has this layer, and layers are compared with its "
            f"{LlamaConfig.model_type}; leave out model.qk_norm and model.attention_bias = qkv"
        )
    config = LlamaConfig(**settings)
    flash = {"flash_attn": "flash_attention_2", "flash_attn.cute": "flash_attention_4"}  # names in transformers
    attention = flash[flash_module().__name__] if context.attention.name == "flash_attn" else "sdpa"
    config._attn_implementation = attention
    theirs = LlamaDecoderLayer(config, 0).to(device, dtype).train()
    theirs.load_state_dict(reference.state_dict())
    positions = torch.arange(run.data.seq_len, device=device)[None]
    embeddings = LlamaRotaryEmbedding(config).to(device)(torch.empty(0, device=device, dtype=dtype), positions)

    def call(x: Tensor) -> Tensor:
        return theirs(x, position_ids=positions, position_embeddings=embeddings)

    chosen = torch.get_float32_matmul_precision()
    found = {
        **{f"llama_ds_{kept}": LayerContestant(own, own, chosen, tables) for kept, own in ours.items()},
        "llama_ds_autograd": LayerContestant(reference, reference, chosen, tables),
        "transformers": LayerContestant(theirs, call, torch_default, embeddings),
        "transformers_checkpointed": LayerContestant(
            theirs, lambda x: checkpoint(call, x, use_reentrant=False), torch_default, embeddings
        ),
    }
    if compiled:
        found["transformers_compiled"] = LayerContestant(theirs, torch.compile(call), torch_default, embeddings)
    for name, compute in _FP8.items() if fp8 else ():
        own_run = replace(run, compute=replace(run.compute, **compute))
        own = ManualBackwardLayer(layer_context(own_run, SingleRank(), device.type, dtype), 0).to(device, dtype)
        own.load_state_dict(reference.state_dict())
        own.lay_weights_together()
        found[f"llama_ds_{name}"] = LayerContestant(own, own, chosen, tables, own.context.products.end_step)
    if device.type == "cpu":
        found["transformers_our_products"] = LayerContestant(theirs, call, chosen, embeddings)
    return found, attention


def check_gradients(timings: dict[str, Timing], dtype: str) -> None:
    """Check that all layers compute the same result: the norms of their input gradients agree."""
    norms = {name: timing.losses[0] for name, timing in timings.items()}
    if max(norms.values()) - min(norms.values()) > _GRADIENT_TOLERANCE[dtype] * max(norms.values()):
        raise AssertionError(f"the layers compute different gradients: {norms}")


def steps(run: RunConfig, batch: np.ndarray, dtype_name: str, compiled: bool = False) -> dict[str, Step]:
    """Return the steps to time, all with the same weights, rows, optimizer settings and clipping.

    Their steps use torch's default matmul precision; the one with `_our_products` uses ours. With `compiled` their
    model also runs under torch.compile, with the fused AdamW.
    """
    dtype, settings = DTYPES[dtype_name], run.optimizer
    rows = torch.from_numpy(batch)
    ids, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    torch_default = torch.get_float32_matmul_precision()
    context = layer_context(run, SingleRank(), "cpu", dtype)
    policies = [run.parallel.recompute] * run.model.num_hidden_layers
    ours = Llama(context, NextTokenLoss(context.tp), policies).to(dtype)
    for layer in ours.layers:
        if isinstance(layer, ManualBackwardLayer):
            layer.lay_weights_together()  # as in DeepSpeed's flat buffers; the conversion parted them

    def theirs(fused: bool | None, compiled: bool = False) -> Step:
        model = transformers_model(run, ours, dtype)
        call = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(
            model.parameters(), LEARNING_RATE, settings.betas, settings.eps, settings.weight_decay, fused=fused
        )

        def loss() -> Tensor:
            return call(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss

        return training_step(model, optimizer, settings.clip, loss)

    own_run = replace(run, optimizer=replace(settings, lr=LEARNING_RATE))
    own_optimizer = build_optimizer(decay_groups(ours, own_run.optimizer, run.model), own_run, run.deepspeed)
    own = training_step(ours, own_optimizer, settings.clip, lambda: ours(ids, labels))
    chosen = torch.get_float32_matmul_precision()
    gemms = gemm_step(run.model, ids.numel(), dtype)
    extra = {"transformers_compiled": with_matmul_precision(theirs(True, compiled), torch_default)} if compiled else {}
    return {
        "transformers": with_matmul_precision(theirs(fused=None), torch_default),
        "transformers_fused_adamw": with_matmul_precision(theirs(fused=True), torch_default),
        "transformers_our_products": with_matmul_precision(theirs(fused=True), chosen),
        **extra,
        "llama_ds_model": with_matmul_precision(own, chosen),
        "llama_ds_engine": with_matmul_precision(_engine_step(run, batch), chosen),
        "gemms": with_matmul_precision(gemms, torch_default),
        "gemms_our_products": with_matmul_precision(gemms, chosen),
    }


def transformers_model(run: RunConfig, source: Llama, dtype: torch.dtype) -> PreTrainedModel:
    """Return a transformers model of the same shape with a copy of our weights."""
    config = hf_config(run.model, run.data.seq_len, str(dtype).removeprefix("torch."))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(dtype)
    count = run.model.num_hidden_layers
    weights = {
        hf_name(i, name, count): w for i, layer in enumerate(source.layers) for name, w in layer.state_dict().items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {HEAD.name} or (missing and not run.model.tie_word_embeddings):
        raise AssertionError(f"transformers uses other weight names: {missing} missing, {unexpected} unexpected")
    model.tie_weights()
    return model.train()


def _engine_step(run: RunConfig, batch: np.ndarray) -> Step:
    """Return a step of the engine used in training, from the same initial weights."""
    layout = Layout(micro_batch=len(batch))
    config = deepspeed_config(run, layout, bf16_native=True)
    world.join(world.RankInfo(0, 1, 0))
    engine = build_engine(run, layout, config, torch.device("cpu"))
    batches = itertools.repeat(batch)
    return lambda: engine.read(engine.train_step(batches, LEARNING_RATE))[0]


def check_losses(timings: dict[str, Timing], dtype: str) -> None:
    """Check that all contestants compute the same result: their losses on the initial weights agree."""
    first = {name: timing.losses[0] for name, timing in timings.items() if not name.startswith("gemms")}
    if max(first.values()) - min(first.values()) > _LOSS_TOLERANCE[dtype]:
        raise AssertionError(
            f"losses on the same weights and rows differ by more than {_LOSS_TOLERANCE[dtype]}: {first}"
        )
