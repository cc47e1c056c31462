"""Meta's format of a LLaMA: consolidated.NN.pth for each model-parallel rank, params.json, tokenizer.model.

It differs from this project's format in four points: weight names; rows of query and key heads are ordered in adjacent
rotary pairs; the embedding is sharded by columns in LLaMA 1, 2 and Code Llama, and by rows from Llama 3 on; a tied head
is stored as a copy of the embedding.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace

from llama_ds.checkpoint.carried import ORIGINAL, TOKENIZER, carried_files
from llama_ds.checkpoint.choices import STAGED
from llama_ds.checkpoint.formats.dcp import holds_dcp
from llama_ds.checkpoint.formats.frequencies import dropped_frequencies
from llama_ds.checkpoint.formats.hf_settings import TOKEN_IDS
from llama_ds.checkpoint.formats.inventory import check_file, check_names, merged, model_files, same, shown
from llama_ds.checkpoint.formats.meta_params import PARAMS, Unsaid, model_of, params_of, read_params, seq_len_of
from llama_ds.checkpoint.formats.norm_copies import norm_drift
from llama_ds.checkpoint.formats.plan import OutputFile, OutputTensor, Plan, Target, as_json, check_parts, part_shape
from llama_ds.checkpoint.formats.views import ROTATED, Columns, RotaryReordered, TableRows
from llama_ds.checkpoint.stored import Stored, torch_tensors
from llama_ds.checkpoint.weights import DTYPES, ModelFiles, Readable, tokenizer_copies
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError
from llama_ds.layout.weights import EMBEDDING_KEY, Key, weight_of, weight_shapes

PART = re.compile(r"consolidated\.(\d\d)\.pth")
OTHER_PART = re.compile(r"consolidated\b.*\.(pth|pt|bin|safetensors)")
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
LLAMA3_VOCABULARY = 128_256
LLAMA2_THETA = 10_000.0  # the code of LLaMA 1 and 2 has no other
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
# Derived from rope_theta: at the top in LLaMA 2, in every layer in LLaMA 1.
FREQUENCIES = re.compile(r"(layers\.\d+\.attention\.(inner_attention\.)?)?rope\.freqs")


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
    found = [torch_tensors(path) for path in paths]
    parts = [{n: t for n, t in part.items() if not FREQUENCIES.fullmatch(n)} for part in found]
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
    derived = {n: t for n, t in found[0].items() if FREQUENCIES.fullmatch(n)}
    norms = [name for key, name in names.items() if weight_of(key[1]).cut is None]
    notes += (*dropped_frequencies(folder, derived, model, PARAMS), *norm_drift(norms, parts, paths))
    return replace(files, notes=notes)


def holds_meta(folder: str) -> bool:
    """Return whether a folder looks like a Meta release."""
    names = os.listdir(folder)
    if any(PART.fullmatch(name) for name in names):
        return True
    return PARAMS in names and not holds_dcp(folder)  # torchtitan's checkpoints need one, too


def plan_meta(files: ModelFiles, target: Target) -> Plan:
    """Return the plan: one file for each of `target.tp` model-parallel ranks.

    Raises:
        UserError: Meta's code does not support the model, it cannot be sharded over that many ranks, or nothing says
            along which dimension the embedding is sharded.
    """
    if target.pp != 1:
        raise UserError(f"command line: --pp applies only to {STAGED}; leave it out for meta")
    params = params_of(files.model, files.path)
    check_parts(files, target)
    embedding_dim = _embedding_dim(files, target)
    outputs = tuple(
        OutputFile(f"consolidated.{rank:02d}.pth", tuple(_output_tensors(files, rank, target.tp, embedding_dim)))
        for rank in range(target.tp)
    )
    original = os.path.join(files.path, ORIGINAL)
    copied = {TOKENIZER: original} if os.path.exists(original) else tokenizer_copies(files)
    small, dropped = {PARAMS: as_json(params)}, _dropped(files, copied)
    return Plan("meta", DTYPES[target.dtype], outputs, small, copied, dropped=dropped)


def _dropped(files: ModelFiles, copied: Mapping[str, str]) -> tuple[str, ...]:
    """Return what Meta's format has no place for."""
    ids = [f"{key} {files.hf_config[key]}" for key in TOKEN_IDS if files.hf_config.get(key) is not None]
    names = [name for name, path in carried_files(files.path).items() if path not in copied.values()]
    return (f"the sequence length {files.seq_len}", *ids, *names)


def _output_tensors(files: ModelFiles, rank: int, size: int, embedding_dim: int) -> list[OutputTensor]:
    layers = files.model.num_hidden_layers
    outputs = []
    for (layer, local), tensor in files.tensors.items():
        name, source = meta_name(layer, local, layers), tensor
        dim = embedding_dim if name == EMBEDDING else weight_of(local).cut
        if local in ROTATED:
            source = RotaryReordered(tensor, files.model.head_dim, to_halves=False)
        if name == EMBEDDING and dim == 1:
            source = Columns(tensor)
        outputs.append(OutputTensor(name, part_shape(tensor.shape, dim, size), source, rank, size))
        if name == EMBEDDING and files.model.tie_word_embeddings:
            outputs.append(OutputTensor(HEAD, part_shape(tensor.shape, 0, size), tensor, rank, size))
    return outputs


def _embedding_dim(files: ModelFiles, target: Target) -> int:
    """Return the dimension along which the Meta code that will read the result shards the embedding.

    It is the code that reads the model's tokenizer: of Llama 3 (rows) for tiktoken's ranks, of LLaMA 1, 2 and Code
    Llama (columns) for a sentencepiece model. rope_theta does not tell them apart: Code Llama's is 1e6.

    Raises:
        UserError: nothing says which code it is, and the target has several files.
    """
    if target.embedding or target.tp == 1:
        return 1 if target.embedding == "columns" else 0
    if files.tokenizer and os.path.basename(files.tokenizer) == TOKENIZER:
        return 0 if _is_tiktoken(files.tokenizer) else 1
    if files.model.vocab_size == LLAMA3_VOCABULARY or files.model.rope_scaling:
        return 0
    if files.model.rope_theta == LLAMA2_THETA:
        return 1
    raise UserError(
        f"{files.path}: has no tokenizer.model, so nothing says which of Meta's codes will read the result; give "
        "--embedding rows for that of Llama 3, or --embedding columns for that of LLaMA 1, 2 and Code Llama"
    )


def _is_tiktoken(path: str) -> bool:
    with open(path, "rb") as file:
        return bool(re.match(rb"[A-Za-z0-9+/]+=* \d+\s", file.read(200)))


def _table_dim(name: str, parts: list[dict[str, Stored]]) -> int:
    """Return the dimension along which a vocabulary table is sharded.

    The head is always sharded by rows, so an embedding of another width is sharded by columns.
    """
    return 0 if name == HEAD or parts[0][EMBEDDING].shape[1:] == parts[0][HEAD].shape[1:] else 1


def _parts_of(folder: str) -> list[str]:
    """Return the paths of the files of all ranks, in order.

    Raises:
        UserError: a file is missing, or there are weight files of another form, which may be the model as well.
    """
    others = sorted(n for n in os.listdir(folder) if OTHER_PART.fullmatch(n) and not PART.fullmatch(n))
    if others:
        raise UserError(
            f"{folder}: contains {shown(others)} beside consolidated.NN.pth, and no rule says which is the model; "
            "move one of them to another folder"
        )
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
        full = merged(names[key], parts, paths, dim, equal=False)  # `norm_drift` compares them
        tensors[key] = RotaryReordered(full, model.head_dim, to_halves=True) if key[1] in ROTATED else full
    return tensors
