"""Meta's format of a LLaMA: consolidated.NN.pth for each model-parallel rank, params.json, tokenizer.model.

It differs from this project's format in four points: weight names; rows of query and key heads are ordered in adjacent
rotary pairs; the embedding is sharded by columns in LLaMA 1 and 2, and by rows from Llama 3 on; a tied head is stored
as a copy of the embedding.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace

from llama_ds.checkpoint.carried import carried_files
from llama_ds.checkpoint.formats.hf_settings import TOKEN_IDS
from llama_ds.checkpoint.formats.inventory import check_file, check_names, merged, model_files, same
from llama_ds.checkpoint.formats.meta_params import (
    LLAMA3_THETA,
    PARAMS,
    Unsaid,
    model_of,
    params_of,
    read_params,
    seq_len_of,
)
from llama_ds.checkpoint.formats.plan import OutputFile, OutputTensor, Plan, Target, as_json, check_parts, part_shape
from llama_ds.checkpoint.formats.views import Columns, RotaryReordered, TableRows
from llama_ds.checkpoint.stored import Stored, torch_tensors
from llama_ds.checkpoint.weights import DTYPES, ModelFiles, Readable, tokenizer_copies
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError
from llama_ds.layout.weights import EMBEDDING_KEY, Key, weight_of, weight_shapes

PART = re.compile(r"consolidated\.(\d\d)\.pth")
LOCAL = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
}
ROTATED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
IGNORED = ("rope.freqs",)  # derived from rope_theta


def meta_name(layer: int, name: str, num_hidden_layers: int) -> str:
    """Return the name of weight `name` of layer `layer` in Meta's Transformer."""
    if layer == 0:
        return EMBEDDING
    if layer <= num_hidden_layers:
        return f"layers.{layer - 1}.{LOCAL[name]}"
    return "norm.weight" if layer == num_hidden_layers + 1 else HEAD


def open_meta(folder: str, vocab_size: int | None = None, unsaid: Unsaid | None = None) -> ModelFiles:
    """Return the weights of a folder in Meta's release format.

    `vocab_size` resizes the vocabulary tables to that many rows; by default they must match params.json. A head that
    equals the embedding bit for bit is considered tied. `unsaid` is what params.json does not say.

    Raises:
        UserError: a tensor is missing, unknown or misshapen, a file is damaged, or `unsaid` is needed.
    """
    unsaid = unsaid or Unsaid()
    params = read_params(folder)
    paths = _parts_of(folder)
    parts = [{n: t for n, t in torch_tensors(path).items() if n not in IGNORED} for path in paths]
    for path, part in zip(paths, parts, strict=True):
        check_names(path, (EMBEDDING, HEAD), [n for n in part if n in (EMBEDDING, HEAD)])
    embedding, head = (merged(name, parts, paths, _table_dim(name, parts)) for name in (EMBEDDING, HEAD))
    untied = model_of(folder, params, head.shape[0], tied=False, unsaid=unsaid)
    names = {key: meta_name(*key, untied.num_hidden_layers) for key in weight_shapes(untied)}
    for path, part in zip(paths, parts, strict=True):
        check_names(path, names.values(), part)
    table: Readable = TableRows(embedding, embedding.shape[0])
    tied = same(table, head)
    model = replace(untied, tie_word_embeddings=tied)
    tensors = _tensors(model, names, parts, paths)
    tensors[EMBEDDING_KEY] = table
    seq_len, notes = seq_len_of(params, model, unsaid)
    files = model_files(folder, folder, PARAMS, names, model, seq_len, tensors, vocab_size)
    return replace(files, notes=notes)


def holds_meta(folder: str) -> bool:
    """Return whether a folder looks like a Meta release."""
    return os.path.lexists(os.path.join(folder, PARAMS)) or any(PART.fullmatch(name) for name in os.listdir(folder))


def plan_meta(files: ModelFiles, target: Target) -> Plan:
    """Return the plan: one file for each of `target.tp` model-parallel ranks.

    Raises:
        UserError: Meta's code does not support the model, or it cannot be sharded over that many ranks.
    """
    if target.pp != 1:
        raise UserError("command line: --pp applies only to deepspeed; leave it out for meta")
    params = params_of(files.model, files.path)
    check_parts(files, target)
    outputs = tuple(
        OutputFile(f"consolidated.{rank:02d}.pth", tuple(_output_tensors(files, rank, target.tp)))
        for rank in range(target.tp)
    )
    copied = tokenizer_copies(files)
    small, dropped = {PARAMS: as_json(params)}, _dropped(files, copied)
    return Plan("meta", DTYPES[target.dtype], outputs, small, copied, dropped=dropped)


def _dropped(files: ModelFiles, copied: Mapping[str, str]) -> tuple[str, ...]:
    """Return what Meta's format has no place for."""
    ids = [f"{key} {files.hf_config[key]}" for key in TOKEN_IDS if files.hf_config.get(key) is not None]
    names = [name for name in carried_files(files.path) if name not in copied]
    return (f"the sequence length {files.seq_len}", *ids, *names)


def _output_tensors(files: ModelFiles, rank: int, size: int) -> list[OutputTensor]:
    layers = files.model.num_hidden_layers
    outputs = []
    for (layer, local), tensor in files.tensors.items():
        name, source = meta_name(layer, local, layers), tensor
        dim = _dim(name, local, files.model)
        if local in ROTATED:
            source = RotaryReordered(tensor, files.model.head_dim, to_halves=False)
        if name == EMBEDDING and dim == 1:
            source = Columns(tensor)
        outputs.append(OutputTensor(name, part_shape(tensor.shape, dim, size), source, rank, size))
        if name == EMBEDDING and files.model.tie_word_embeddings:
            outputs.append(OutputTensor(HEAD, part_shape(tensor.shape, 0, size), tensor, rank, size))
    return outputs


def _dim(name: str, local: str, model: ModelConfig) -> int | None:
    """Return the dimension along which Meta shards a tensor: the same as here, except for the embedding."""
    if name == EMBEDDING:
        return 0 if model.rope_theta >= LLAMA3_THETA else 1
    return weight_of(local).cut


def _table_dim(name: str, parts: list[dict[str, Stored]]) -> int:
    """Return the dimension along which a vocabulary table is sharded.

    The head is always sharded by rows, so an embedding of another width is sharded by columns.
    """
    return 0 if name == HEAD or parts[0][EMBEDDING].shape[1:] == parts[0][HEAD].shape[1:] else 1


def _parts_of(folder: str) -> list[str]:
    """Return the paths of the files of all ranks, in order.

    Raises:
        UserError: a file is missing.
    """
    found = {int(match[1]) for name in os.listdir(folder) if (match := PART.fullmatch(name))}
    return [check_file(os.path.join(folder, f"consolidated.{i:02d}.pth")) for i in range(max(found, default=0) + 1)]


def _tensors(
    model: ModelConfig, names: dict[Key, str], parts: list[dict[str, Stored]], paths: list[str]
) -> dict[Key, Readable]:
    tensors: dict[Key, Readable] = {}
    for key in weight_shapes(model):
        if key == EMBEDDING_KEY:
            continue
        dim = weight_of(key[1]).cut
        full = merged(names[key], parts, paths, dim)
        tensors[key] = RotaryReordered(full, model.head_dim, to_halves=True) if key[1] in ROTATED else full
    return tensors
