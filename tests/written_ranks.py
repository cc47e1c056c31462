"""Small models of every kind, and their files as the ranks of a layout write them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch

from llama_ds.checkpoint.formats.layer_files import layer_file
from llama_ds.checkpoint.manifest import WEIGHT, FileEntry, Record, StoredPiece, checksum, name_of
from llama_ds.checkpoint.stored import Stored, torch_tensors
from llama_ds.checkpoint.weights import DTYPES
from llama_ds.config.schema import ModelConfig, RopeScaling, RunConfig
from llama_ds.model.llama import Llama, shared_parts
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

META_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)  # what Meta's code has built in
SHAPES = {  # of models that every format can hold; LLaMA 1 and 2 cut the embedding otherwise than Llama 3
    "mha": replace(MODEL, num_key_value_heads=4, rope_scaling=None),
    "gqa": replace(MODEL, rope_scaling=None, rms_norm_eps=1e-6),
    "tied": replace(MODEL, rope_scaling=None, rope_theta=500_000.0, tie_word_embeddings=True),
    "llama3": replace(MODEL, rope_scaling=META_SCALING, rope_theta=500_000.0, intermediate_size=112),
}

Write = Callable[..., str]  # (tp, by_layer, tied=, document_mask=, dtype=, model=) -> the run's folder


class Rank(SingleRank):
    """One of several tensor-parallel ranks, as far as its weights are concerned."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def build(run: RunConfig, rank: int = 0, size: int = 1) -> Llama:
    """Return one tensor-parallel rank's model with its initial weights."""
    context = shared_parts(run, Rank(rank, size), "cpu", torch.float32)
    return Llama(context, NextTokenLoss(SingleRank()))


def write_rank(run: RunConfig, folder: str, rank: int, tp: int, by_layer: bool, dtype: str) -> Record:
    """Write one tensor-parallel rank's weights: a file per layer, or one whose tensors the index cuts in two."""
    record = Record(rank)
    layers = [layer.to(DTYPES[dtype]).state_dict() for layer in build(run, rank, tp).layers]
    if by_layer:
        contents = {layer_file(index, rank): {(index, n): w for n, w in s.items()} for index, s in enumerate(layers)}
    else:
        whole = {(index, name): w for index, state in enumerate(layers) for name, w in state.items()}
        contents = {f"mp_rank_{rank:02d}_model_states.pt": whole}
    for file, tensors in contents.items():
        path = os.path.join(folder, file)
        torch.save({name_of(key): weight for key, weight in tensors.items()}, path)
        record.files[file] = FileEntry(os.path.getsize(path), checksum(path), rank)
        for name, stored in torch_tensors(path).items():
            if rank == 0 or "norm" not in name:
                record.pieces[name] = pieces(file, rank, stored, [0] if by_layer else [0, 13])
    return record


def pieces(file: str, rank: int, stored: Stored, starts: list[int]) -> list[StoredPiece]:
    """Return the runs of a tensor that begin at `starts`."""
    ends = [*starts[1:], torch.Size(stored.shape).numel()]
    size, dtype = stored.dtype.itemsize, str(stored.dtype).removeprefix("torch.")
    return [
        StoredPiece(WEIGHT, rank, start, end - start, file, stored.offset + start * size, dtype)
        for start, end in zip(starts, ends, strict=True)
    ]
