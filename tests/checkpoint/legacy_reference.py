"""The model of Megatron-LM before Megatron core, and of Megatron-DeepSpeed, and files as their code writes them.

It follows megatron/model/transformer.py of github.com/deepspeedai/Megatron-DeepSpeed (`ParallelAttention.forward`
before and since commit 676a482c, `swiglu`), and `_transpose_first_dim` in megatron/checkpointing.py for earlier
checkpoint_versions, which changes the fused matrix of a rank to the order of version 2 before it is used.

Shapes: B rows, T tokens, H heads and G groups per rank, K head size.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron_reference import rms_norm, rotate
from torch import Tensor
from transformers import LlamaForCausalLM

Rank = dict[str, Tensor]  # flat state dict of a rank, in Megatron-DeepSpeed's names
EMBEDDING, NORM = "language_model.embedding.word_embeddings.weight", "language_model.encoder.final_layernorm.weight"
HEAD, QKV = "language_model.output_layer.weight", "self_attention.query_key_value.weight"


def split_groups(mixed: Tensor, heads: int, groups: int) -> list[Tensor]:
    """Code before 2024-12-04: [B, T, (H + 2 G) K] is viewed as [B, T, G, H / G + 2, K]."""
    size = mixed.shape[-1] // (heads + 2 * groups)
    mixed = mixed.view(*mixed.shape[:2], groups, heads // groups + 2, size)
    parts = torch.split(mixed, [heads // groups, 1, 1], dim=-2)
    return [part.reshape(*mixed.shape[:2], -1, size) for part in parts]


def split_thirds(mixed: Tensor, heads: int, groups: int) -> list[Tensor]:
    """Code since 2024-12-04."""
    third = mixed.shape[-1] // 3
    return [mixed[..., i * third : (i + 1) * third].reshape(*mixed.shape[:2], heads, -1) for i in range(3)]


def transposed(fused: Tensor, heads: int, splits_first: bool) -> Tensor:
    """`_transpose_first_dim`: the fused matrix of a rank in the order of version 2."""
    if splits_first:  # version 0
        return fused.view(3, heads, -1, fused.shape[-1]).transpose(0, 1).reshape(fused.shape)
    return fused.view(heads, -1, 3, fused.shape[-1]).transpose(1, 2).reshape(fused.shape)


@torch.no_grad()
def logits(ranks: list[Rank], args: argparse.Namespace, split: Callable[..., list[Tensor]], tokens: Tensor) -> Tensor:
    """Return logits, padding included, in fp32."""
    heads, groups, k = (n // len(ranks) for n in (args.num_attention_heads, args.num_key_value_heads, len(ranks)))
    k = args.kv_channels
    inv_freq = 1.0 / (args.rope_theta ** (torch.arange(0, k, 2).float() / k))
    freqs = torch.outer(torch.arange(tokens.shape[1]).float(), inv_freq)
    emb, eps = torch.cat((freqs, freqs), dim=-1), args.layernorm_epsilon
    mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
    h = F.embedding(tokens, torch.cat([rank[EMBEDDING] for rank in ranks]))
    for layer in range(args.num_layers):
        own = [
            {n.partition(f".layers.{layer}.")[2]: t for n, t in r.items() if f".layers.{layer}." in n} for r in ranks
        ]
        x, total = rms_norm(h, own[0]["input_layernorm.weight"], eps), torch.zeros_like(h)
        for rank in own:
            q, key, v = split(F.linear(x, rank[QKV]), heads, groups)
            q, key = rotate(q, emb, False), rotate(key, emb, False)
            key, v = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (key, v))
            q, key, v = (t.transpose(1, 2) for t in (q, key, v))
            scores = F.softmax(q @ key.transpose(2, 3) / math.sqrt(k) + mask, dim=-1)
            total += F.linear((scores @ v).transpose(1, 2).flatten(2), rank["self_attention.dense.weight"])
        h = h + total
        x, total = rms_norm(h, own[0]["post_attention_layernorm.weight"], eps), torch.zeros_like(h)
        for rank in own:
            first, second = torch.chunk(F.linear(x, rank["mlp.dense_h_to_4h.weight"]), 2, dim=-1)
            total += F.linear(F.silu(first) * second, rank["mlp.dense_4h_to_h.weight"])
        h = h + total
    h = rms_norm(h, ranks[0][NORM], eps)
    return torch.cat([F.linear(h, rank.get(HEAD, rank[EMBEDDING])) for rank in ranks], -1)


def ranks_of(model: LlamaForCausalLM, tp: int, fuse: Callable[[list[Tensor]], Tensor]) -> list[Rank]:
    """Return the state dicts of the ranks; `fuse` fuses q, k and v (heads, K, D) of a rank."""
    state, config = model.state_dict(), model.config
    ranks: list[Rank] = [{} for _ in range(tp)]
    padded = torch.zeros(-(-config.vocab_size // (128 * tp)) * 128 * tp, config.hidden_size)

    def put(name: str, tensor: Tensor, dim: int | None) -> None:
        for rank, part in zip(ranks, tensor.chunk(tp, dim) if dim is not None else (tensor,) * tp, strict=True):
            rank[name] = part.clone()

    def table(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, padded[len(tensor) :]])

    put(EMBEDDING, table(state["model.embed_tokens.weight"]), 0)
    for layer in range(config.num_hidden_layers):
        own = {n.removeprefix(f"model.layers.{layer}."): t for n, t in state.items() if f".{layer}." in n}
        prefix = f"language_model.encoder.layers.{layer}."
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            put(prefix + name, own[name], None)
        put(prefix + "self_attention.dense.weight", own["self_attn.o_proj.weight"], 1)
        put(prefix + "mlp.dense_4h_to_h.weight", own["mlp.down_proj.weight"], 1)
        gate, up = (own[f"mlp.{name}_proj.weight"].chunk(tp) for name in ("gate", "up"))
        qkv = [own[f"self_attn.{name}_proj.weight"].view(-1, config.head_dim, config.hidden_size) for name in "qkv"]
        for index, rank in enumerate(ranks):
            rank[prefix + "mlp.dense_h_to_4h.weight"] = torch.cat([gate[index], up[index]])
            rank[prefix + QKV] = fuse([t.chunk(tp)[index] for t in qkv]).reshape(-1, config.hidden_size).clone()
    put(NORM, state["model.norm.weight"], None)
    if not config.tie_word_embeddings:
        put(HEAD, table(state["lm_head.weight"]), 0)
    return ranks


def nested(flat: Rank) -> dict[str, Any]:
    """Return the nested state dict that `state_dict_for_save_checkpoint` makes."""
    language: dict[str, Any] = {"encoder": {}, "moe_state_dict": {}}
    for name, tensor in flat.items():
        module, _, local = name.removeprefix("language_model.").partition(".")
        inner = local.removeprefix("word_embeddings.")
        if module == "embedding":
            language[module] = {"word_embeddings": {inner: tensor}}
        else:
            language.setdefault(module, {})[local] = tensor
    return {"language_model": language}


def args_of(model: LlamaForCausalLM, tp: int, pp: int, **more: Any) -> argparse.Namespace:
    config = model.config
    return argparse.Namespace(
        num_layers=config.num_hidden_layers, hidden_size=config.hidden_size, ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
        kv_channels=config.head_dim, layernorm_epsilon=config.rms_norm_eps, normalization="rmsnorm", swiglu=True,
        add_bias_linear=False, use_rotary_position_embeddings=True, rotary_percent=1.0, rope_theta=10_000,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings, num_experts=[1], max_position_embeddings=64,
        padded_vocab_size=-(-config.vocab_size // (128 * tp)) * 128 * tp, vocab_size=None, init_method_std=0.2,
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, deepspeed=True, **more,
    )  # fmt: skip


def save_pipeline(ranks: list[Rank], args: argparse.Namespace, folder: Path) -> Path:
    """Write what Megatron-DeepSpeed saves of a pipeline."""
    where = folder / "global_step10"
    where.mkdir(parents=True)
    (folder / "latest").write_text("global_step10")
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    last = args.num_layers + 1
    for number, flat in enumerate(ranks):
        layers: dict[int, Rank] = {1: {"word_embeddings.weight": flat[EMBEDDING]}, last + 1: {"weight": flat[NORM]}}
        if HEAD in flat:
            layers[last + 2] = {"lm_head.weight": flat[HEAD]}
        for name, tensor in flat.items():
            layer, _, local = name.partition(".layers.")[2].partition(".")
            if layer:
                layers.setdefault(int(layer) + 2, {})[local] = tensor
        for index, state in layers.items():
            torch.save(state, where / f"layer_{index:02d}-model_{number:02d}-model_states.pt")
    for number in range(len(ranks) * args.pipeline_model_parallel_size):
        state = {"module": None, "args": args, "checkpoint_version": 3.0, "iteration": 10, "ds_version": "0.16"}
        torch.save(state, where / f"mp_rank_{number:02d}_model_states.pt")
    return folder
