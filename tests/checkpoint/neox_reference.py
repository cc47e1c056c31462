"""GPT-NeoX's model as a reference for its checkpoints: all ranks, each with its own files.

It follows megatron/model/transformer.py of github.com/EleutherAI/gpt-neox: `ParallelSelfAttention.forward` (without
groups, the product is viewed as heads, each of which is split into query, key and value), `gqa_project` of the present
code (the product is split into all queries, keys and values) and of that before commit 96c242eb (it is viewed as heads
of queries, each with its share of the keys and values), `Gated_Activation` (the second half is activated) and
`LLaMAParallelMLP`, which it replaced. Of tensor-parallel ranks, column-parallel products and the vocabulary are
concatenated, row-parallel products are added.

Shapes: B rows, T tokens, H heads and G heads of keys per rank, K head size.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


class NeoxModel:
    """The model in a folder with one configuration file in JSON; it computes logits in fp32."""

    def __init__(self, folder: Path, present: bool = True) -> None:
        where = folder / (folder / "latest").read_text().strip()
        (config,) = (where / "configs").iterdir()
        self.config, self.present = json.loads(config.read_text()), present
        self.tp = self.config["model_parallel_size"]
        self.ranks: list[dict[int, dict[str, Tensor]]] = []
        for rank in range(self.tp):
            paths = where.glob(f"layer_*-model_{rank:02d}-model_states.pt")
            layers = {int(path.name[6:8]): load(path) for path in paths}
            if not layers:
                for name, tensor in load(where / f"mp_rank_{rank:02d}_model_states.pt")["module"].items():
                    index, _, local = name.removeprefix("sequential.").partition(".")
                    layers.setdefault(int(index), {})[local] = tensor
            self.ranks.append(layers)

    def parts(self, layer: int, name: str) -> list[Tensor]:
        return [rank[layer][name].float() for rank in self.ranks]

    def norm(self, x: Tensor, layer: int, name: str) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.parts(layer, name)[0] * (x * torch.rsqrt(variance + self.config["rms_norm_epsilon"]))

    def rotate(self, x: Tensor) -> Tensor:
        """Apply the rotary embedding to (B, T, H, K)."""
        steps = torch.arange(0, x.shape[-1], 2).float() / x.shape[-1]
        freqs = torch.outer(torch.arange(x.shape[1]).float(), 1.0 / (self.config["rotary_emb_base"] ** steps))
        emb = torch.cat((freqs, freqs), dim=-1)[:, None]
        first, second = x.chunk(2, dim=-1)
        return x * emb.cos() + torch.cat((-second, first), dim=-1) * emb.sin()

    def qkv(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        heads, size = c["num_attention_heads"] // self.tp, c["hidden_size"] // c["num_attention_heads"]
        groups = c.get("num_kv_heads", c["num_attention_heads"]) // self.tp
        if groups == heads:
            q, k, v = mixed.view(*mixed.shape[:2], heads, 3 * size).chunk(3, dim=-1)
        elif self.present:
            q, k, v = mixed.split([heads * size, groups * size, groups * size], dim=-1)
        else:
            own = size * groups // heads
            q, k, v = mixed.reshape(*mixed.shape[:2], heads, size + 2 * own).split([size, own, own], dim=-1)
        q, k, v = (t.reshape(*mixed.shape[:2], n, size) for t, n in ((q, heads), (k, groups), (v, groups)))
        return q, k.contiguous(), v.contiguous()

    def attention(self, x: Tensor, layer: int) -> Tensor:
        total = torch.zeros_like(x)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        fused, dense = (self.parts(layer, f"attention.{name}.weight") for name in ("query_key_value", "dense"))
        for rank in range(self.tp):
            q, k, v = self.qkv(F.linear(x, fused[rank]))
            q, k = self.rotate(q), self.rotate(k)
            k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, K)
            probs = F.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + mask, dim=-1)
            total += F.linear((probs @ v).transpose(1, 2).flatten(2), dense[rank])
        return total

    def mlp(self, x: Tensor, layer: int) -> Tensor:
        total = torch.zeros_like(x)
        for rank in self.ranks:
            w = {name: tensor.float() for name, tensor in rank[layer].items()}
            if "mlp.w1.weight" in w:
                inner = F.silu(F.linear(x, w["mlp.w1.weight"])) * F.linear(x, w["mlp.w3.weight"])
                total += F.linear(inner, w["mlp.w2.weight"])
                continue
            ffn_dim = int(self.config["intermediate_size"] * 2 / 3)  # as ParallelMLP sizes its matrices
            assert w["mlp.linear1.weight"].shape[0] == ffn_dim // self.tp
            assert w["mlp.linear2.weight"].shape[1] == ffn_dim // 2 // self.tp
            up, gate = F.linear(x, w["mlp.linear1.weight"]).chunk(2, dim=-1)
            total += F.linear(F.silu(gate) * up, w["mlp.linear2.weight"])
        return total

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        last = self.config["num_layers"] + 1
        tables = self.parts(0, "word_embeddings.weight")
        h = F.embedding(tokens, torch.cat(tables))
        for layer in range(2, last + 1):
            h = h + self.attention(self.norm(h, layer, "input_layernorm.scale"), layer)
            h = h + self.mlp(self.norm(h, layer, "post_attention_layernorm.scale"), layer)
        h = self.norm(h, last + 2, "norm.scale")
        head = self.parts(last + 3, "final_linear.weight") if self.config["no_weight_tying"] else tables
        return torch.cat([F.linear(h, part) for part in head], -1)
