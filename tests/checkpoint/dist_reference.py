"""Megatron-LM's distributed checkpoints, as the ranks of megatron-core save them with torch's DCP.

It follows `TransformerBlock.sharded_state_dict`, `apply_swiglu_sharded_factory`, `make_sharded_tensors_for_checkpoint`
and `MCoreSavePlanner` in megatron/core. Files of megatron-core 0.16.1 itself, of 1 rank and of tp 2 times pp 2, with
stacked layers and with layers apart, were read with all weights equal to those of its format torch.

Shapes: L layers; G groups; K head size.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from transformers import LlamaForCausalLM

Blocks = list[tuple[tuple[int, ...], Tensor]]  # begin and data of each


class Sharded(torch.Tensor):
    """A tensor of which DCP saves given blocks."""

    def __new__(cls, shape: tuple[int, ...], blocks: Blocks) -> Sharded:
        return torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape))  # type: ignore[attr-defined]

    def __init__(self, shape: tuple[int, ...], blocks: Blocks) -> None:
        self._blocks = {torch.Size(begin): data for begin, data in blocks}

    def __create_write_items__(self, name: str, tensor: Sharded) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, begin),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(begin, data.shape), TensorProperties.create_from_tensor(data), self.shape
                ),
            )
            for begin, data in self._blocks.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self._blocks[torch.Size(index.offset or ())]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


class Planner(dcp.DefaultSavePlanner):
    """Writes bytes as they are."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return object


def cut(tensor: Tensor, dim: int | None, tp: int, begin: tuple[int, ...] = ()) -> Blocks:
    """Return the blocks of tp ranks, each with a leading dimension of size 1 for each number of `begin`."""
    found, offset = [], 0
    for part in tensor.chunk(tp, dim) if dim is not None else (tensor,):
        at = tuple(offset if axis == dim else 0 for axis in range(tensor.ndim))
        found.append(((*begin, *at), part.clone()[(None,) * len(begin)]))
        offset += part.shape[dim or 0]
    return found


def global_tensors(model: LlamaForCausalLM, tp: int, stacked: bool) -> dict[str, Sharded]:
    """Return the tensors of a model by the names of their keys in Megatron core."""
    state, config = model.state_dict(), model.config
    layers, groups = config.num_hidden_layers, config.num_key_value_heads
    rows = -(-config.vocab_size // (128 * tp)) * 128 * tp
    tables = {"embedding.word_embeddings.weight": "model.embed_tokens.weight", "output_layer.weight": "lm_head.weight"}
    found: dict[str, Sharded] = {}
    for name, local in tables.items():
        if not (config.tie_word_embeddings and local == "lm_head.weight"):
            table = torch.cat([state[local], torch.zeros(rows - config.vocab_size, config.hidden_size)])
            found[name] = Sharded(tuple(table.shape), cut(table, 0, tp))
    norm = state["model.norm.weight"]
    found["decoder.final_layernorm.weight"] = Sharded(tuple(norm.shape), cut(norm, None, tp))
    own: dict[str, list[tuple[Tensor, int | None]]] = {}
    for layer in range(layers):
        at = {n.removeprefix(f"model.layers.{layer}."): t for n, t in state.items() if f".layers.{layer}." in n}
        qkv = [at[f"self_attn.{n}_proj.weight"].reshape(groups, -1, config.hidden_size) for n in "qkv"]
        pair = [at[f"mlp.{n}_proj.weight"] for n in ("gate", "up")]
        rows_of = {
            "self_attention.linear_qkv.layer_norm_weight": (at["input_layernorm.weight"], None),
            "self_attention.linear_qkv.weight": (torch.cat(qkv, 1).reshape(-1, config.hidden_size), 0),
            "self_attention.linear_proj.weight": (at["self_attn.o_proj.weight"], 1),
            "mlp.linear_fc1.layer_norm_weight": (at["post_attention_layernorm.weight"], None),
            "mlp.linear_fc2.weight": (at["mlp.down_proj.weight"], 1),
        }
        # Each rank has a block of gate and one of up; stacked, all blocks of gate are before those of up.
        if stacked:
            rows_of["mlp.linear_fc1.weight"] = (torch.cat(pair), 0)
        else:
            rows_of |= {f"mlp.linear_fc1.weight_{letter}": (t, 0) for letter, t in zip("wv", pair, strict=True)}
        for name, row in rows_of.items():
            own.setdefault(name, []).append(row)
    for name, tensors in own.items():
        parts = 2 * tp if name == "mlp.linear_fc1.weight" else tp
        if stacked:
            shape = (layers, *tensors[0][0].shape)
            blocks = [b for layer, (t, dim) in enumerate(tensors) for b in cut(t, dim, parts, (layer,))]
            found[f"decoder.layers.{name}"] = Sharded(shape, blocks)
        else:
            for layer, (tensor, dim) in enumerate(tensors):
                found[f"decoder.layers.{layer}.{name}"] = Sharded(tuple(tensor.shape), cut(tensor, dim, parts))
    return found


def save_distributed(model: LlamaForCausalLM, args: argparse.Namespace, folder: Path, tp: int, stacked: bool) -> Path:
    """Save a checkpoint: with stacked layers and common.pt, or layers apart and the common state in .metadata."""
    where = folder / "iter_0000010"
    where.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    (where / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    shared = {"args": args, "checkpoint_version": 3.0, "iteration": 10, "optimizer": {"param_groups": [{"lr": 0.1}]}}
    state: dict[str, Any] = dict(global_tensors(model, tp, stacked))
    state["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.ones(4)
    state["rng_state/shard_0.0_1.1"] = io.BytesIO(b"pickled")
    if stacked:
        torch.save(shared, where / "common.pt")
    else:
        state["common_state/shard_0_1"] = content = io.BytesIO()
        torch.save([shared], content)
    writer = dcp.FileSystemWriter(where, thread_count=1, sync_files=False)
    dcp.save(state, storage_writer=writer, planner=Planner(flatten_state_dict=False), no_dist=True)
    return folder
