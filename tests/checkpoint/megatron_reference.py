"""Megatron core's GPTModel as a reference for its checkpoints: all ranks, each with its own file.

It follows megatron/core/transformer/attention.py (`SelfAttention.get_query_key_value_tensors`: the product of the fused
matrix is viewed as groups, each of which is split into its queries, its key and its value), mlp.py (`glu`: the product
is chunked in two, and the first is activated) and models/common/embeddings of github.com/NVIDIA/Megatron-LM. Of
tensor-parallel ranks, column-parallel products and the vocabulary are concatenated, row-parallel products are added.

Shapes: B rows, T tokens, G groups per rank, H heads per rank, K head size.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def frequencies(args: argparse.Namespace) -> Tensor:
    inv_freq = 1.0 / (args.rotary_base ** (torch.arange(0, args.kv_channels, 2).float() / args.kv_channels))
    if not args.use_rope_scaling:
        return inv_freq
    factor, low, high, old_context_len = args.rope_scaling_factor, 1, 4, 8192
    wavelen = 2 * math.pi / inv_freq
    scaled = torch.where(wavelen > old_context_len / low, inv_freq / factor, inv_freq)
    smooth = (old_context_len / wavelen - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelen < old_context_len / high) * ~(wavelen > old_context_len / low)
    return torch.where(medium, smoothed, scaled)


def rotate(x: Tensor, emb: Tensor, interleaved: bool) -> Tensor:
    """Apply the rotary embedding (T, K) to (B, T, H, K)."""
    if interleaved:
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
    return x * emb.cos()[:, None] + rotated * emb.sin()[:, None]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


class MegatronModel:
    """The model in a folder, without virtual pipeline; it computes logits in fp32."""

    def __init__(self, folder: Path) -> None:
        name = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
        where = folder / (name if name == "release" else f"iter_{int(name):07d}")
        args = self.args = load(next(iter(sorted(where.glob("mp_rank_*")))) / "model_optim_rng.pt")["args"]
        tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        suffixes = [f"_{stage:03d}" for stage in range(pp)] if pp > 1 else [""]
        self.stages = [
            [load(where / f"mp_rank_{rank:02d}{suffix}" / "model_optim_rng.pt")["model"] for rank in range(tp)]
            for suffix in suffixes
        ]
        assert len(list(where.iterdir())) == tp * pp

    def vocabulary(self, tokens: Tensor) -> Tensor:
        tables = [rank["embedding.word_embeddings.weight"].float() for rank in self.stages[0]]
        assert len(tables[0]) == self.args.padded_vocab_size // len(tables)
        return F.embedding(tokens, torch.cat(tables))

    def attention(self, x: Tensor, ranks: list[dict[str, Tensor]], name: str, emb: Tensor) -> Tensor:
        a, total = self.args, torch.zeros_like(x)
        all_groups = a.num_query_groups if a.group_query_attention else a.num_attention_heads
        heads, groups = a.num_attention_heads // len(ranks), all_groups // len(ranks)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        for rank in ranks:
            mixed_qkv = F.linear(x, rank[f"{name}.linear_qkv.weight"].float())
            mixed_qkv = mixed_qkv.view(*x.shape[:2], groups, (heads // groups + 2) * a.kv_channels)
            q, k, v = mixed_qkv.split([heads // groups * a.kv_channels, a.kv_channels, a.kv_channels], dim=3)
            q = rotate(q.reshape(*x.shape[:2], heads, a.kv_channels), emb, a.rotary_interleaved)
            k = rotate(k, emb, a.rotary_interleaved)
            k, v = (t.repeat_interleave(heads // groups, dim=2) for t in (k, v))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, K)
            scores = F.softmax(q @ k.transpose(2, 3) / math.sqrt(a.kv_channels) + mask, dim=-1)
            total += F.linear((scores @ v).transpose(1, 2).flatten(2), rank[f"{name}.linear_proj.weight"].float())
        return total

    def mlp(self, x: Tensor, ranks: list[dict[str, Tensor]], name: str) -> Tensor:
        total = torch.zeros_like(x)
        for rank in ranks:
            gate, up = F.linear(x, rank[f"{name}.linear_fc1.weight"].float()).chunk(2, dim=-1)
            total += F.linear(F.silu(gate) * up, rank[f"{name}.linear_fc2.weight"].float())
        return total

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        args, local = self.args, self.args.transformer_impl == "local"
        freqs = torch.outer(torch.arange(tokens.shape[1]).float(), frequencies(args))
        emb = freqs.repeat_interleave(2, -1) if args.rotary_interleaved else torch.cat((freqs, freqs), dim=-1)
        norms = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
        if not local:
            norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        h, eps = self.vocabulary(tokens), args.norm_epsilon
        for ranks in self.stages:
            for index in range(args.num_layers // len(self.stages)):
                layer = f"decoder.layers.{index}"
                before_attention, before_mlp = (ranks[0][f"{layer}.{norm}"].float() for norm in norms)
                h = h + self.attention(rms_norm(h, before_attention, eps), ranks, f"{layer}.self_attention", emb)
                h = h + self.mlp(rms_norm(h, before_mlp, eps), ranks, f"{layer}.mlp")
        last = self.stages[-1]
        h = rms_norm(h, last[0]["decoder.final_layernorm.weight"].float(), eps)
        shared = not args.untie_embeddings_and_output_weights and len(self.stages) == 1
        head = "embedding.word_embeddings.weight" if shared else "output_layer.weight"
        logits = torch.cat([F.linear(h, rank[head].float()) for rank in last], -1)
        assert not logits[..., args.vocab_size :].any()  # the rows of padding are zeros
        return logits[..., : args.vocab_size]
