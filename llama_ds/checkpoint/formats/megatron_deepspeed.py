"""Megatron-DeepSpeed's checkpoints of a LLaMA: folders of DeepSpeed's engine, as `engine_files` describes them.

The engine's file holds Megatron's `args`. Its pipeline has layer 1, the embedding, layers 2 .. L + 1, the decoder
layers, L + 2, the final norm, and L + 3, the head, unless it is tied. Without a pipeline, `module` is the nested state
dict of `megatron_legacy`.

Query, key and value are ordered by groups in code before 2024-12-04 (commit 676a482c). Later code has for each rank its
queries, its keys and its values; it does not compute grouped heads. It is recognised by its argument
ds_sequence_parallel_fpdt.

Sources: megatron/model/gpt_model.py, transformer.py and megatron/checkpointing.py of
github.com/deepspeedai/Megatron-DeepSpeed.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llama_ds.checkpoint.formats.engine_files import (
    LAYER_FILE,
    RANK_FILE,
    engine_content,
    foreign_names,
    layer_holds,
    layer_parts,
    module_tensors,
    rank_paths,
)
from llama_ds.checkpoint.formats.megatron_args import MegatronSettings, settings_of
from llama_ds.checkpoint.formats.megatron_legacy import ROOT, block_lengths, core_names, modern_args
from llama_ds.checkpoint.formats.megatron_tensors import EXTRA_STATE, Chunk, qkv_lengths
from llama_ds.checkpoint.formats.meta_params import Unsaid
from llama_ds.checkpoint.formats.rank_parts import RankParts
from llama_ds.checkpoint.stored import Stored
from llama_ds.errors import UserError

BLOCKS_SINCE = "ds_sequence_parallel_fpdt"  # argument of the code that orders query, key and value in blocks
FIRST = 1  # layer of the embedding


@dataclass(frozen=True)
class MegatronSource:
    """A checkpoint, as it was read."""

    where: str
    settings: MegatronSettings
    chunks: list[Chunk]
    lengths: tuple[int, int, int]  # rows of query, key and value that take turns


def holds_megatron_deepspeed(folder: str) -> bool:
    """Return whether a folder looks like Megatron-DeepSpeed's checkpoints, or one of them."""
    where, names = foreign_names(folder)
    if any(LAYER_FILE.fullmatch(name) for name in names):
        return layer_holds(where, FIRST, "word_embeddings.weight")
    if not any(RANK_FILE.fullmatch(name) for name in names):
        return False
    try:
        path = rank_paths(where)[0]
        return any(name.startswith(f"{ROOT}.") for name in module_tensors(path, engine_content(path)))
    except UserError:
        return False


def read_megatron_deepspeed(where: str, vocab_size: int | None, unsaid: Unsaid) -> MegatronSource:
    """Return a checkpoint of Megatron-DeepSpeed, one of the folders global_stepN.

    Raises:
        UserError: its args are not those of a LLaMA, or a file is missing or damaged.
    """
    paths = rank_paths(where)
    content = engine_content(paths[0])
    args = content.get("args")
    settings = settings_of(paths[0], modern_args(paths[0], args, unsaid), vocab_size, unsaid)
    layers = layer_parts(where)
    ranks = len(next(iter(layers.values())).parts) if layers else len(paths)
    if ranks != settings.tp:
        raise UserError(
            f"{where}: holds files of {ranks} ranks, args.tensor_model_parallel_size = {settings.tp}; copy all files"
        )
    chunk = _pipeline(where, settings, layers) if layers else _whole(paths)
    model = settings.model
    given, blocks = unsaid.qkv_order, isinstance(args, Namespace) and hasattr(args, BLOCKS_SINCE)
    if given is None and blocks and model.num_key_value_heads == model.num_attention_heads:
        given = "blocks"
        note = (
            f"query, key and value: in blocks, as Megatron-DeepSpeed computes since 2024-12-04 (args.{BLOCKS_SINCE} is "
            "there); otherwise --qkv-order heads"
        )
        settings = replace(settings, notes=(*settings.notes, note))
    lengths = block_lengths(model, ranks) if given == "blocks" else qkv_lengths(model)
    return MegatronSource(where, settings, [chunk], lengths)


def _whole(paths: Sequence[str]) -> Chunk:
    """Return the model in files that hold all weights of a rank."""
    states = [module_tensors(path, engine_content(path)) for path in paths]
    parts = [
        core_names(path, {name: tensor for name, tensor in state.items() if not name.endswith(EXTRA_STATE)})
        for path, state in zip(paths, states, strict=True)
    ]
    return Chunk(tuple(paths), tuple(parts))


def _pipeline(where: str, settings: MegatronSettings, layers: dict[int, RankParts]) -> Chunk:
    """Return the model in the files of its layers."""
    model = settings.model
    last = FIRST + model.num_hidden_layers
    ends = {FIRST: "embedding", last + 1: "encoder", last + 2: "output_layer"}
    names = {"weight": "final_layernorm.weight", "lm_head.weight": "weight"}
    parts: list[dict[str, Stored]] = [{} for _ in range(settings.tp)]
    for index, part in layers.items():
        if not FIRST <= index <= last + (1 if model.tie_word_embeddings else 2):
            raise UserError(
                f"{part.paths[0]}: layer {index} is none of a model with args.num_layers = {model.num_hidden_layers}; "
                "copy the checkpoint again"
            )
        prefix = ends.get(index, f"encoder.layers.{index - FIRST - 1}")
        for own, tensors in zip(parts, part.parts, strict=True):
            for name, tensor in tensors.items():
                own[f"{ROOT}.{prefix}.{names.get(name, name) if index > last else name}"] = tensor
    wanted = set(range(FIRST, last + (2 if model.tie_word_embeddings else 3)))
    if missing := sorted(wanted - layers.keys()):
        raise UserError(f"{where}: layer {missing[0]} of {max(wanted)} is missing; copy the files of all layers")
    labels = tuple(f"{where} (model_{rank:02d})" for rank in range(settings.tp))
    return Chunk(labels, tuple(core_names(label, own) for label, own in zip(labels, parts, strict=True)))
