"""Meta's published model as a reference for consolidated files: all model-parallel ranks, each with its own file.

It follows llama/model.py of github.com/meta-llama/llama and llama3, and models/llama3/reference_impl of llama-models:
rotary embeddings rotate adjacent pairs as complex numbers. From fairscale: ColumnParallelLinear, RowParallelLinear,
ParallelEmbedding (LLaMA 1 and 2, sharded by columns) and VocabParallelEmbedding (Llama 3, sharded by rows).

Shapes: B rows, T tokens, H heads per rank, K head size.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def apply_scaling(freqs: Tensor) -> Tensor:
    scale_factor, low_freq_factor, high_freq_factor, old_context_len = 8, 1, 4, 8192
    new_freqs = []
    for freq in freqs:
        wavelen = 2 * math.pi / freq
        if wavelen < old_context_len / high_freq_factor:
            new_freqs.append(freq)
        elif wavelen > old_context_len / low_freq_factor:
            new_freqs.append(freq / scale_factor)
        else:
            smooth = (old_context_len / wavelen - low_freq_factor) / (high_freq_factor - low_freq_factor)
            new_freqs.append((1 - smooth) * freq / scale_factor + smooth * freq)
    return torch.tensor(new_freqs, dtype=freqs.dtype)


def precompute_freqs_cis(dim: int, end: int, theta: float, use_scaled: bool) -> Tensor:
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: (dim // 2)].float() / dim))
    freqs = torch.outer(torch.arange(end).float(), apply_scaling(freqs) if use_scaled else freqs)
    return torch.polar(torch.ones_like(freqs), freqs)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    x_ = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(x_ * freqs_cis[None, :, None]).flatten(3).type_as(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


class MetaModel:
    """The model in a folder; it computes logits in fp32."""

    def __init__(self, folder: Path) -> None:
        self.p = json.loads((folder / "params.json").read_text())
        files = sorted(folder.glob("consolidated.*.pth"))
        self.ranks = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
        hidden_dim = int(2 * 4 * self.p["dim"] / 3)
        if self.p.get("ffn_dim_multiplier") is not None:
            hidden_dim = int(self.p["ffn_dim_multiplier"] * hidden_dim)
        hidden_dim = self.p["multiple_of"] * ((hidden_dim + self.p["multiple_of"] - 1) // self.p["multiple_of"])
        for w in self.ranks:
            assert w["layers.0.feed_forward.w1.weight"].shape == (hidden_dim // len(files), self.p["dim"])

    def embed(self, tokens: Tensor) -> Tensor:
        tables = [w["tok_embeddings.weight"].float() for w in self.ranks]
        if tables[0].shape[1] == self.p["dim"] // len(tables):  # the code of LLaMA 1, 2 and Code Llama
            return torch.cat([F.embedding(tokens, table) for table in tables], -1)
        assert tables[0].shape[1] == self.p["dim"]
        out, size = torch.zeros(*tokens.shape, self.p["dim"]), len(tables[0])
        for rank, table in enumerate(tables):
            here = (tokens >= rank * size) & (tokens < (rank + 1) * size)
            out += F.embedding((tokens - rank * size).masked_fill(~here, 0), table) * here[..., None]
        return out

    def attention(self, x: Tensor, name: str, freqs_cis: Tensor) -> Tensor:
        total, size = torch.zeros_like(x), len(self.ranks)
        heads, kv_heads = self.p["n_heads"] // size, (self.p.get("n_kv_heads") or self.p["n_heads"]) // size
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        for w in self.ranks:
            q, k, v = (F.linear(x, w[f"{name}.{m}.weight"].float()).unflatten(-1, (n, -1))
                       for m, n in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads)))  # fmt: skip
            q, k = apply_rotary_emb(q, freqs_cis), apply_rotary_emb(k, freqs_cis)
            k, v = (t.repeat_interleave(heads // kv_heads, dim=2) for t in (k, v))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, K)
            scores = F.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + mask, dim=-1)
            total += F.linear((scores @ v).transpose(1, 2).flatten(2), w[f"{name}.wo.weight"].float())
        return total

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        total = torch.zeros_like(x)
        for w in self.ranks:
            w1, w2, w3 = (w[f"{name}.{m}.weight"].float() for m in ("w1", "w2", "w3"))
            total += F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
        return total

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        p, norms = self.p, self.ranks[0]
        freqs_cis = precompute_freqs_cis(
            p["dim"] // p["n_heads"], tokens.shape[1], p.get("rope_theta", 10000.0), p.get("use_scaled_rope", False)
        )
        h = self.embed(tokens)
        for i in range(p["n_layers"]):
            x = rms_norm(h, norms[f"layers.{i}.attention_norm.weight"].float(), p["norm_eps"])
            h = h + self.attention(x, f"layers.{i}.attention", freqs_cis)
            x = rms_norm(h, norms[f"layers.{i}.ffn_norm.weight"].float(), p["norm_eps"])
            h = h + self.feed_forward(x, f"layers.{i}.feed_forward")
        h = rms_norm(h, norms["norm.weight"].float(), p["norm_eps"])
        return torch.cat([F.linear(h, w["output.weight"].float()) for w in self.ranks], -1)
