"""Layers and training steps, ours and transformers', of the same weights, for `benchmarks/step.py` to time in turns."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llama_ds.benchmarks.layer import LayerContestant
from llama_ds.benchmarks.step import Step, Timing, gemm_step, training_step, with_products
from llama_ds.checkpoint.formats.hf_config import hf_config
from llama_ds.checkpoint.names import hf_name
from llama_ds.checkpoint.weights import DTYPES
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.schema import RunConfig
from llama_ds.layout.layout import Layout
from llama_ds.layout.weights import HEAD
from llama_ds.model.attention import flash_module
from llama_ds.model.decoder import DecoderLayer
from llama_ds.model.llama import Llama, shared_parts
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.model.tensor_parallel import SingleRank
from llama_ds.parallel import world
from llama_ds.training.engines.build import build_engine
from llama_ds.training.engines.optimizer_groups import build_optimizer, decay_groups

LEARNING_RATE = 1e-4
_STEPS_AGREE = {"fp32": 1e-5, "bf16": 2e-2}  # of the losses on the initial weights
_LAYERS_AGREE = {"fp32": 1e-4, "bf16": 2e-2}  # of the input gradients' norms, relative


def layers(
    run: RunConfig, policy: str, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, LayerContestant], str]:
    """Return the layers to time, with the same weights, and what attention transformers is given.

    Ours keep nothing away from the backward (`none`), or what `policy` says. Theirs multiply as torch comes, on a CPU
    also as ours do.
    """
    as_torch_comes = torch.get_float32_matmul_precision()
    context = shared_parts(run, SingleRank(), device.type, dtype)
    tables = context.rotary.on(device)
    reference = DecoderLayer(context, 0).to(device, dtype)
    policies = dict.fromkeys(("none", policy))  # in this order, once each
    ours = {kept: ManualBackwardLayer(context, 0, kept).to(device, dtype) for kept in policies}
    for written_out in ours.values():
        written_out.load_state_dict(reference.state_dict())
        written_out.lay_weights_together()  # as DeepSpeed's flat buffers do
    config = LlamaConfig(**hf_config(run.model, run.data.seq_len, str(dtype).removeprefix("torch.")))
    flash = {"flash_attn": "flash_attention_2", "flash_attn.cute": "flash_attention_4"}  # as transformers names them
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
        "transformers": LayerContestant(theirs, call, as_torch_comes, embeddings),
        "transformers_checkpointed": LayerContestant(
            theirs, lambda x: checkpoint(call, x, use_reentrant=False), as_torch_comes, embeddings
        ),
    }
    if device.type == "cpu":
        found["transformers_our_products"] = LayerContestant(theirs, call, chosen, embeddings)
    return found, attention


def check_gradients(timings: dict[str, Timing], dtype: str) -> None:
    """Make sure that all layers computed the same thing: the norms of their inputs' gradients agree."""
    sizes = {name: timing.losses[0] for name, timing in timings.items()}
    if max(sizes.values()) - min(sizes.values()) > _LAYERS_AGREE[dtype] * max(sizes.values()):
        raise AssertionError(f"the layers compute different gradients: {sizes}")


def steps(run: RunConfig, batch: np.ndarray, dtype_name: str) -> dict[str, Step]:
    """Return the steps to time: the same weights, rows, optimizer settings and clipping for all.

    Theirs multiply as torch comes, the one with `_our_products` as ours do.
    """
    dtype, settings = DTYPES[dtype_name], run.optimizer
    rows = torch.from_numpy(batch)
    ids, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    as_torch_comes = torch.get_float32_matmul_precision()
    context = shared_parts(run, SingleRank(), "cpu", dtype)
    policies = [run.parallel.recompute] * run.model.num_hidden_layers
    ours = Llama(context, NextTokenLoss(context.tp), policies).to(dtype)

    def theirs(fused: bool | None) -> Step:
        model = transformers_model(run, ours, dtype)
        optimizer = torch.optim.AdamW(
            model.parameters(), LEARNING_RATE, settings.betas, settings.eps, settings.weight_decay, fused=fused
        )

        def loss() -> Tensor:
            return model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss

        return training_step(model, optimizer, settings.clip, loss)

    own_settings = replace(settings, lr=LEARNING_RATE)
    own_optimizer = build_optimizer(decay_groups(ours, own_settings), own_settings, run.deepspeed)
    own = training_step(ours, own_optimizer, settings.clip, lambda: ours(ids, labels))
    chosen = torch.get_float32_matmul_precision()
    gemms = gemm_step(run.model, ids.numel(), dtype)
    return {
        "transformers": with_products(theirs(fused=None), as_torch_comes),
        "transformers_fused_adamw": with_products(theirs(fused=True), as_torch_comes),
        "transformers_our_products": with_products(theirs(fused=True), chosen),
        "llama_ds_model": with_products(own, chosen),
        "llama_ds_engine": with_products(_engine_step(run, batch), chosen),
        "gemms": with_products(gemms, as_torch_comes),
        "gemms_our_products": with_products(gemms, chosen),
    }


def transformers_model(run: RunConfig, source: Llama, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return transformers' model of the same shape with a copy of our weights."""
    config = hf_config(run.model, run.data.seq_len, str(dtype).removeprefix("torch."))
    model = LlamaForCausalLM(LlamaConfig(**config)).to(dtype)
    count = run.model.num_hidden_layers
    weights = {
        hf_name(i, name, count): w for i, layer in enumerate(source.layers) for name, w in layer.state_dict().items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {HEAD.name} or (missing and not run.model.tie_word_embeddings):
        raise AssertionError(f"transformers names its weights otherwise: {missing} missing, {unexpected} unexpected")
    model.tie_weights()
    return model.train()


def _engine_step(run: RunConfig, batch: np.ndarray) -> Step:
    """Return the step as training takes it: DeepSpeed's engine, from the same initial weights."""
    layout = Layout(micro_batch=len(batch))
    config = deepspeed_config(run, layout, bf16_native=True)
    world.join(world.RankInfo(0, 1, 0))
    engine = build_engine(run, layout, config, torch.device("cpu"))
    batches = itertools.repeat(batch)
    return lambda: engine.read(engine.train_step(batches, LEARNING_RATE))[0]


def check_losses(timings: dict[str, Timing], dtype: str) -> None:
    """Make sure that all contestants computed the same thing: their losses on the initial weights agree."""
    first = {name: timing.losses[0] for name, timing in timings.items() if not name.startswith("gemms")}
    if max(first.values()) - min(first.values()) > _STEPS_AGREE[dtype]:
        raise AssertionError(f"losses on the same weights and rows differ by more than {_STEPS_AGREE[dtype]}: {first}")
