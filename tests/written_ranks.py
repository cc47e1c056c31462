"""Small models of every kind, and their checkpoint files as written by the ranks of a layout."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch

from llama_ds.checkpoint.formats.engine_files import layer_file
from llama_ds.checkpoint.manifest import WEIGHT, FileEntry, Record, StoredPiece, checksum, name_of
from llama_ds.checkpoint.stored import Stored, torch_tensors
from llama_ds.checkpoint.weights import DTYPES
from llama_ds.config.schema import ModelConfig, MupConfig, RopeScaling, RunConfig
from llama_ds.layout.weights import EMBEDDING, FINAL_NORM, HEAD, decoder_layer, key_of, weight_of
from llama_ds.model.llama import Llama, layer_context
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.tensor_parallel import SingleRank

SEQ_LEN = 32
MODEL = ModelConfig(
    vocab_size=800,
    hidden_size=32,
    intermediate_size=88,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16),
)

META_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)  # constants in Meta's code
# Models that Hugging Face's format and ours support, and their architectures in transformers.
NEIGHBOURS = {
    "qwen2": replace(MODEL, attention_bias="qkv", rope_scaling=RopeScaling(4.0, None, None, 8, "yarn", beta_fast=4.0)),
    "qwen3": replace(MODEL, attention_bias="qkvo", qk_norm=True, head_dim=16, rope_scaling=None),
    "llama": replace(MODEL, attention_bias="qkvo", mlp_bias=True, rope_scaling=RopeScaling(2.0, rope_type="linear")),
    "dynamic": replace(MODEL, rope_scaling=RopeScaling(2.0, None, None, 16, "dynamic")),
    "mup": replace(MODEL, mup=MupConfig(12, 3), tie_word_embeddings=True),
    "mup qwen3": replace(MODEL, mup=MupConfig(8, 32), attention_bias="qkvo", qk_norm=True, rope_scaling=None),
}
# Models that every format supports. LLaMA 1 and 2 shard the embedding along another dimension than Llama 3.
SHAPES = {
    "mha": replace(MODEL, num_key_value_heads=4, rope_scaling=None),
    "gqa": replace(MODEL, rope_scaling=None, rms_norm_eps=1e-6),
    "tied": replace(MODEL, rope_scaling=None, rope_theta=500_000.0, tie_word_embeddings=True),
    "llama3": replace(MODEL, rope_scaling=META_SCALING, rope_theta=500_000.0, intermediate_size=112),
}

Write = Callable[..., str]  # (tp, by_layer, tied=, document_mask=, dtype=, model=) -> the run's folder


class Rank(SingleRank):
    """One of several tensor-parallel ranks, without communication: enough to create its weights."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def build(run: RunConfig, rank: int = 0, size: int = 1) -> Llama:
    """Return one tensor-parallel rank's model with its initial weights."""
    context = layer_context(run, Rank(rank, size), "cpu", torch.float32)
    model = Llama(context, NextTokenLoss(SingleRank()))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        row = weight_of(name)
        if row not in (*decoder_layer(MODEL), EMBEDDING, FINAL_NORM, HEAD):  # zeros or ones would hide their order
            values = torch.cos(number + torch.arange(row.numel(run.model))) / 5
            parameter.data += values if row.cut is None else values.chunk(size)[rank]
    return model


def write_rank(run: RunConfig, folder: str, rank: int, tp: int, by_layer: bool, dtype: str) -> Record:
    """Write one tensor-parallel rank's weights: one file per layer, or a single file with two runs per tensor."""
    record = Record(rank)
    layers = [layer.to(DTYPES[dtype]).state_dict() for layer in build(run, rank, tp).layers]
    if by_layer:
        contents = {layer_file(index, rank): {(index, n): w for n, w in s.items()} for index, s in enumerate(layers)}
    else:
        all_weights = {(index, name): w for index, state in enumerate(layers) for name, w in state.items()}
        contents = {f"mp_rank_{rank:02d}_model_states.pt": all_weights}
    for file, tensors in contents.items():
        path = os.path.join(folder, file)
        torch.save({name_of(key): weight for key, weight in tensors.items()}, path)
        record.files[file] = FileEntry(os.path.getsize(path), checksum(path), rank)
        for name, stored in torch_tensors(path).items():
            weight = weight_of(key_of(name)[1])
            if rank == 0 or weight.cut is not None:
                numel = weight.own_numel(run.model, rank, tp)  # the rest is padding of the vocabulary
                record.pieces[name] = pieces(file, rank, stored, [0] if by_layer else [0, 13], numel)
    return record


def pieces(file: str, rank: int, stored: Stored, starts: list[int], numel: int) -> list[StoredPiece]:
    """Return the runs of a tensor's first `numel` elements, which begin at `starts`."""
    ends = [*starts[1:], numel]
    size, dtype = stored.dtype.itemsize, str(stored.dtype).removeprefix("torch.")
    return [
        StoredPiece(WEIGHT, rank, start, end - start, file, stored.offset + start * size, dtype)
        for start, end in zip(starts, ends, strict=True)
    ]
