"""GPT-NeoX's checkpoints of a LLaMA: folders of DeepSpeed's engine, as `engine_files` describes them.

Its pipeline has layer 0, the embedding, layers 2 .. L + 1, the decoder layers, L + 3, the final norm, and L + 4, the
head, unless it is tied. Without a pipeline the names begin with the number of the layer: `sequential.2.`.
`neox_config` reads the configuration files, and `fused` describes the fused matrices:

- Query, key and value of H heads without groups: for each head its K rows of query, of key and of value. Of G groups,
  code before 2024-11-13 has the same, with K G / H rows of key and of value for each head of queries ("heads"); later
  code has for each tensor-parallel rank its queries, keys and values ("blocks"). Nothing in a checkpoint says which.
- Gate and up: until 2024-09 two matrices, `w1` and `w3`; since then `linear1`, which has for each rank its rows of up,
  then those of gate.

Sources: megatron/model/transformer.py, gpt2_model.py and megatron/checkpointing.py of github.com/EleutherAI/gpt-neox.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llama_ds.checkpoint.formats.engine_files import (
    LAYER_FILE,
    RANK_FILE,
    checkpoint_in,
    engine_content,
    foreign_names,
    layer_holds,
    layer_parts,
    module_tensors,
    rank_file,
    rank_paths,
)
from llama_ds.checkpoint.formats.frequencies import dropped_frequencies
from llama_ds.checkpoint.formats.fused import Unfused
from llama_ds.checkpoint.formats.inventory import model_files, shown
from llama_ds.checkpoint.formats.meta_params import Unsaid
from llama_ds.checkpoint.formats.neox_config import (
    NeoxShapes,
    check_args,
    initializer_range_of,
    model_of,
    optional,
    read_configs,
    seq_len_of,
)
from llama_ds.checkpoint.formats.norm_copies import norm_drift
from llama_ds.checkpoint.formats.rank_parts import RankParts
from llama_ds.checkpoint.stored import Stored
from llama_ds.checkpoint.weights import ModelFiles, Readable, tokenizer_in
from llama_ds.config.reader import ConfigSource
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError
from llama_ds.layout.weights import EMBEDDING_KEY, Key, weight_of, weight_shapes

SEQUENTIAL = "sequential."
EMBEDDING, FINAL_NORM, HEAD = "word_embeddings.weight", "norm.scale", "final_linear.weight"
QKV, UP_GATE = "attention.query_key_value.weight", "mlp.linear1.weight"
Q, K, V = (f"self_attn.{name}_proj.weight" for name in "qkv")
GATE, UP, DOWN = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
NORMS = {
    "input_layernorm.weight": "input_layernorm.scale",
    "post_attention_layernorm.weight": "post_attention_layernorm.scale",
}
OUTPUT = {"self_attn.o_proj.weight": "attention.dense.weight"}
FUSED_MLP = {DOWN: "mlp.linear2.weight"}
SEPARATE_MLP = {GATE: "mlp.w1.weight", UP: "mlp.w3.weight", DOWN: "mlp.w2.weight"}
FREQUENCIES = "attention.rotary_emb.inv_freq"
RECORD = "llama_ds"  # key in the engine's file of what this project writes beside it
FIRST_LAYER = 2


@dataclass(frozen=True)
class _Source:
    """A checkpoint as it was read."""

    where: str
    state_path: str  # engine's file of rank 0
    state: Mapping[str, Any]
    layers: Mapping[int, RankParts]  # by number in the pipeline
    frequencies: Mapping[str, Stored]

    @property
    def first(self) -> RankParts:
        """The first decoder layer."""
        return self.layers[FIRST_LAYER]


def open_neox(folder: str, vocab_size: int | None = None, unsaid: Unsaid | None = None) -> ModelFiles:
    """Return the weights of a GPT-NeoX checkpoint.

    Args:
        folder: the folder that GPT-NeoX saves to (its newest checkpoint), or one checkpoint in it.
        vocab_size: rows of the vocabulary tables; by default all that the files have, the padding, too.
        unsaid: what the files do not say.

    Raises:
        UserError: the configuration is not that of a LLaMA, a file or tensor is missing, unknown or misshapen, or
            `unsaid` is needed.
    """
    unsaid = unsaid or Unsaid()
    if unsaid.rope_factor is not None:
        raise UserError(f"command line: --rope-factor does not apply to {folder}: GPT-NeoX has no rotary scaling")
    found = _source(checkpoint_in(folder))
    config, given = read_configs(found.where)
    source, shapes = ConfigSource(config), _shapes(found)
    model = model_of(source, given, shapes)
    ranks = optional(source, given, "model_parallel_size", int, 1)
    if ranks != shapes.tp:
        raise source.error("model_parallel_size", f"= {ranks}, the files are those of {shapes.tp} ranks; copy all")
    seq_len = seq_len_of(source, given, unsaid)
    _check_recorded(found, model, config, ranks)
    _check_ranks(config, model, ranks)
    order = _qkv_order(found, model, shapes, unsaid)
    names, tensors = _tensors(found, model, shapes, qkv_lengths(config, model, ranks, order))
    files = model_files(folder, found.where, config, names, model, seq_len, tensors, vocab_size)
    notes = [*dropped_frequencies(found.where, found.frequencies, model, config), *_norm_notes(found, model)]
    if vocab_size is None:
        notes.append(f"vocabulary: all {shapes.rows} rows, of which the last may be padding; fewer by --vocab-size N")
    return replace(
        files,
        tokenizer=files.tokenizer or tokenizer_in(found.where),
        initializer_range=initializer_range_of(source, given),
        notes=tuple(notes),
    )


def holds_neox(folder: str) -> bool:
    """Return whether a folder looks like GPT-NeoX's checkpoints, or one of them."""
    where, names = foreign_names(folder)
    if any(LAYER_FILE.fullmatch(name) for name in names):
        return layer_holds(where, 0, EMBEDDING)  # Megatron-DeepSpeed's layer 0 has no weights
    if not any(RANK_FILE.fullmatch(name) for name in names):
        return False
    try:
        path = rank_paths(where)[0]
        return any(name.startswith(SEQUENTIAL) for name in module_tensors(path, engine_content(path)))
    except UserError:
        return False


def qkv_lengths(config: str, model: ModelConfig, tp: int, order: str) -> tuple[int, int, int]:
    """Return the rows of queries, keys and values that take turns in an order of `choices.QKV_ORDERS`.

    Raises:
        UserError: the heads of queries do not divide the rows of keys, as the order by heads needs.
    """
    queries, keys = model.num_attention_heads, model.num_key_value_heads
    if order == "blocks":
        return queries // tp * model.head_dim, keys // tp * model.head_dim, keys // tp * model.head_dim
    if model.head_dim * keys % queries:
        raise UserError(f"{config}: num_kv_heads = {keys} cannot be ordered by heads; convert with --qkv-order blocks")
    own = model.head_dim * keys // queries
    return model.head_dim, own, own


def up_gate_lengths(model: ModelConfig, tp: int) -> tuple[int, int]:
    """Return the rows of up and gate on each tensor-parallel rank."""
    return model.intermediate_size // tp, model.intermediate_size // tp


def _source(where: str) -> _Source:
    layers = layer_parts(where)
    paths = rank_paths(where)
    state = engine_content(paths[0])
    if not layers:
        layers = _sequential(paths)
    derived: dict[str, Stored] = {}
    for index, part in layers.items():
        if FREQUENCIES in part.parts[0]:
            derived[f"{index}.{FREQUENCIES}"] = part.parts[0][FREQUENCIES]
            kept = tuple({n: t for n, t in tensors.items() if n != FREQUENCIES} for tensors in part.parts)
            layers[index] = RankParts(part.paths, kept)
    if FIRST_LAYER not in layers or 0 not in layers:
        raise UserError(f"{where}: has no layer {0 if 0 not in layers else FIRST_LAYER}; copy the checkpoint again")
    return _Source(where, paths[0], state, layers, derived)


def _sequential(paths: list[str]) -> dict[int, RankParts]:
    """Return the layers in files that hold all weights of a rank."""
    ranks = [module_tensors(path, engine_content(path)) for path in paths]
    parts: list[dict[int, dict[str, Stored]]] = [{} for _ in paths]
    for path, own, tensors in zip(paths, parts, ranks, strict=True):
        for name, tensor in tensors.items():
            index, _, local = name.removeprefix(SEQUENTIAL).partition(".")
            if not (name.startswith(SEQUENTIAL) and index.isascii() and index.isdigit() and len(index) < 7):
                raise UserError(f"{path}: tensor {name} is unknown to GPT-NeoX; give a checkpoint that it saved")
            own.setdefault(int(index), {})[local] = tensor
    indices = sorted({index for own in parts for index in own})
    return {index: RankParts(tuple(paths), tuple(own.get(index, {}) for own in parts)) for index in indices}


def _shapes(found: _Source) -> NeoxShapes:
    """Return the sizes that only tensors tell.

    Raises:
        UserError: a matrix that tells them is missing or misshapen.
    """
    tables, first = found.layers[0], found.first
    tp, fused = len(first.parts), UP_GATE in first.parts[0]
    down = (FUSED_MLP if fused else SEPARATE_MLP)[DOWN]
    sizes = []
    for part, name, dim in ((tables, EMBEDDING, 0), (first, down, 1)):
        tensor = part.parts[0].get(name)
        if tensor is None or len(tensor.shape) != 2:
            what = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
            raise UserError(
                f"{part.paths[0]}: {name} {what}; the names of a LLaMA are those of a GPT-NeoX without Transformer "
                "Engine, biases and experts: give such a checkpoint"
            )
        sizes.append(tensor.shape[dim] * tp)
    return NeoxShapes(sizes[0], sizes[1], fused, tp)


def _check_recorded(found: _Source, model: ModelConfig, config: str, tp: int) -> None:
    sizes = {
        "num_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "padded_vocab_size": model.vocab_size,
        "model_parallel_size": tp,
    }
    check_args(found.state_path, found.state.get("args"), sizes, config)


def _check_ranks(config: str, model: ModelConfig, tp: int) -> None:
    for key in ("num_attention_heads", "num_key_value_heads"):
        if getattr(model, key) % tp:
            raise UserError(f"{config}: {key} = {getattr(model, key)} is not divisible by the {tp} ranks; copy again")


def _qkv_order(found: _Source, model: ModelConfig, shapes: NeoxShapes, unsaid: Unsaid) -> str:
    record = found.state.get(RECORD)
    recorded = record.get("qkv_order") if isinstance(record, dict) else None
    if recorded is not None and unsaid.qkv_order not in (None, recorded):
        raise UserError(f"command line: --qkv-order {unsaid.qkv_order}: {found.state_path} has {recorded}; omit it")
    if order := unsaid.qkv_order or recorded:
        return str(order)
    if model.num_key_value_heads == model.num_attention_heads or not shapes.fused:
        return "heads"
    raise UserError(
        f"{found.where}: does not say how the rows of query, key and value are ordered; convert with --qkv-order "
        "blocks if a GPT-NeoX of 2024-11-13 (commit 96c242eb) or later saved it, else with --qkv-order heads"
    )


def layer_index(layer: int, num_hidden_layers: int) -> int:
    """Return the number of a layer in GPT-NeoX's pipeline."""
    return 0 if layer == 0 else layer + 1 if layer <= num_hidden_layers else layer + 2


def _local_names(model: ModelConfig, fused: bool) -> dict[str, str]:
    """Return the names of the tensors that hold the weights of a decoder layer."""
    mlp = {**FUSED_MLP, GATE: UP_GATE, UP: UP_GATE} if fused else SEPARATE_MLP
    return {**NORMS, Q: QKV, K: QKV, V: QKV, **OUTPUT, **mlp}


def _tensors(
    found: _Source, model: ModelConfig, shapes: NeoxShapes, lengths: tuple[int, int, int]
) -> tuple[dict[Key, str], dict[Key, Readable]]:
    """Return the names, for messages, and the tensors of a model."""
    local = _local_names(model, shapes.fused)
    layers = model.num_hidden_layers
    ends = {EMBEDDING_KEY: EMBEDDING, (layers + 1, "norm.weight"): FINAL_NORM, (layers + 2, "lm_head.weight"): HEAD}
    keys = weight_shapes(model)
    wanted: dict[int, list[str]] = {}
    names = {key: ends.get(key) or local[key[1]] for key in keys}
    for key, name in names.items():
        wanted.setdefault(layer_index(key[0], layers), []).append(name)
    _check_layers(found, wanted)
    tensors: dict[Key, Readable] = {}
    for layer in range(layers + 3):
        part = found.layers.get(layer_index(layer, layers))
        if part is None:
            continue
        for name, tensor in _layer_tensors(part, {n: names[n] for n in keys if n[0] == layer}, model, lengths):
            tensors[layer, name] = tensor
    return names, {key: tensors[key] for key in keys}


def _layer_tensors(
    part: RankParts, names: Mapping[Key, str], model: ModelConfig, lengths: tuple[int, int, int]
) -> Iterator[tuple[str, Readable]]:
    fused = {QKV: ((Q, K, V), lengths), UP_GATE: ((UP, GATE), up_gate_lengths(model, len(part.parts)))}
    for (_, local), name in names.items():
        shape = weight_of(local).shape(model)
        if name not in fused:
            yield local, part.merged(name, weight_of(local).cut, shape, "the configuration", equal=False)
    for name in dict.fromkeys(name for name in names.values() if name in fused):
        members, turns = fused[name]
        rows = sum(weight_of(member).shape(model)[0] for member in members)
        whole = part.merged(name, 0, (rows, model.hidden_size), "the configuration")
        for index, member in enumerate(members):
            yield member, Unfused(whole, turns, index)


def _check_layers(found: _Source, wanted: Mapping[int, list[str]]) -> None:
    """Check that the layers have exactly the tensors wanted."""
    for index, names in wanted.items():
        if index not in found.layers:
            raise UserError(
                f"{found.where}: layer {index} of {max(wanted)} is missing ({shown(names)}); copy the files of all"
            )
        found.layers[index].check(list(dict.fromkeys(names)))
    for index, part in found.layers.items():
        if index not in wanted and part.parts[0]:
            raise UserError(
                f"{part.paths[0]}: layer {index} ({shown(list(part.parts[0]))}) is not one of a model of this "
                "configuration; give the configuration files of the run that saved it"
            )


def _norm_notes(found: _Source, model: ModelConfig) -> list[str]:
    """Return a line on norms that differ between the tensor-parallel ranks."""
    norms = (*NORMS.values(), FINAL_NORM)
    ranks: list[dict[str, Stored]] = [{} for _ in found.first.parts]
    for index, part in found.layers.items():
        for own, tensors in zip(ranks, part.parts, strict=True):
            own.update({f"layer {index} {name}": tensors[name] for name in norms if name in tensors})
    return norm_drift(list(ranks[0]), ranks, [f"{found.where} ({rank_file(i)})" for i in range(len(ranks))])
