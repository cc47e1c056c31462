"""Hugging Face's format of a LLaMA: safetensors or pytorch_model*.bin, config.json and tokenizer files.

This project's rotary layout and local weight names are Hugging Face's, so conversion only merges shards and renames.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llama_ds.checkpoint.formats.hf_config import (
    CONFIG,
    TOKEN_IDS,
    hf_config,
    initializer_range_of,
    model_of,
    read_config,
    read_object,
)
from llama_ds.checkpoint.formats.inventory import check_file, check_names, model_files, same
from llama_ds.checkpoint.formats.plan import OutputFile, OutputTensor, Plan, Target, as_json
from llama_ds.checkpoint.manifest import TOKENIZER_FILES
from llama_ds.checkpoint.names import hf_name
from llama_ds.checkpoint.spread import in_one_file
from llama_ds.checkpoint.stored import Stored, safetensors_tensors, torch_tensors
from llama_ds.checkpoint.weights import DTYPES, ORIGINAL, ModelFiles, Readable, tokenizer_copies
from llama_ds.errors import UserError
from llama_ds.layout.weights import Key, weight_of, weight_shapes

SHARD_BYTES = 5 * 10**9  # default limit per file in transformers up to version 4
SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INVERSE_FREQUENCIES = re.compile(r".*\brotary_emb\.inv_freq")  # only in old exports; derived from rope_theta
GENERATION = "generation_config.json"
COPIED_FILES = (ORIGINAL, *TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class HfTokenizer:
    """A tokenizer in the form that transformers reads."""

    files: Mapping[str, bytes]  # by name
    bos: int | None
    eos: int | None
    copy: str | None = None  # where a copy of the source's file goes; None: beside the weights


@dataclass(frozen=True)
class _Found:
    """The tensors of a folder by name, and the path to name in messages about them."""

    path: str
    tensors: dict[str, Stored] = field(default_factory=dict)


def open_huggingface(folder: str, vocab_size: int | None = None) -> ModelFiles:
    """Return the weights of a folder that transformers' LlamaForCausalLM can load.

    `vocab_size` resizes the vocabulary tables to that many rows; by default they must match config.json.

    Raises:
        UserError: the architecture is not supported, a tensor is missing, unknown or misshapen, or a file is damaged.
    """
    config = read_config(folder)
    model, seq_len = model_of(folder, config)
    found = _stored_tensors(folder)
    stored = {n: t for n, t in found.tensors.items() if not INVERSE_FREQUENCIES.fullmatch(n)}
    if model.tie_word_embeddings:
        _drop_tied_head(folder, stored)
    names = {key: hf_name(*key, model.num_hidden_layers) for key in weight_shapes(model)}
    check_names(found.path, names.values(), stored)
    tensors: dict[Key, Readable] = {key: in_one_file(stored[n], weight_of(key[1]).cut) for key, n in names.items()}
    files = model_files(folder, found.path, CONFIG, names, model, seq_len, tensors, vocab_size)
    bos, eos = (config.get(key) for key in TOKEN_IDS[:2])
    return replace(
        files,
        initializer_range=initializer_range_of(folder, config),
        bos_id=bos if isinstance(bos, int) else None,
        eos_id=eos if isinstance(eos, int) else None,  # a chat model has several
    )


def holds_huggingface(folder: str) -> bool:
    """Return whether a folder looks like a Hugging Face model."""
    return os.path.lexists(os.path.join(folder, CONFIG))


def plan_huggingface(files: ModelFiles, target: Target, tokenizer: HfTokenizer | None) -> Plan:
    """Return the plan: files of at most SHARD_BYTES (or a single larger layer), and the files AutoTokenizer reads.

    From a Hugging Face source, tokenizer files and generation settings are copied. Otherwise `tokenizer` is the
    source's; None: it has none that can be read.

    Raises:
        UserError: the target is sharded.
    """
    if (target.tp, target.pp) != (1, 1):
        raise UserError("command line: --tp and --pp apply only to deepspeed and meta; leave them out for hf")
    dtype = DTYPES[target.dtype]
    shards = list(_shards(files, dtype.itemsize))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SAFETENSORS]
    outputs = tuple(OutputFile(name, tuple(shard)) for name, shard in zip(names, shards, strict=True))
    small, copied = _settings(files, str(dtype).removeprefix("torch."), tokenizer)
    if len(shards) > 1:
        where = {tensor.name: output.name for output in outputs for tensor in output.tensors}
        total = sum(output.nbytes(dtype) for output in outputs)
        small[SAFETENSORS + INDEX] = as_json({"metadata": {"total_size": total}, "weight_map": where})
    return Plan("hf", dtype, outputs, small, copied)


def _shards(files: ModelFiles, itemsize: int) -> list[list[OutputTensor]]:
    """Distribute the layers over files."""
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for layer in files.layers():
        tensors = [
            OutputTensor(hf_name(index, name, files.model.num_hidden_layers), tensor.shape, tensor)
            for (index, name), tensor in files.tensors.items()
            if index == layer
        ]
        nbytes = sum(tensor.numel for tensor in tensors) * itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1] += tensors
        size += nbytes
    return shards


def _settings(files: ModelFiles, dtype: str, tokenizer: HfTokenizer | None) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return the small files: the contents of those to write, and the paths of those to copy."""
    if holds_huggingface(files.path):
        config = hf_config(files.model, files.seq_len, dtype, initializer_range=files.initializer_range)
        source = read_object(os.path.join(files.path, CONFIG))
        for key in TOKEN_IDS:
            config.pop(key, None)  # without a key transformers has a default, which is not null
        config.update({key: source[key] for key in TOKEN_IDS if key in source})
        kept = {name: os.path.join(files.path, name) for name in (*COPIED_FILES, GENERATION)}
        return {CONFIG: as_json(config)}, {name: path for name, path in kept.items() if os.path.exists(path)}
    given = tokenizer or HfTokenizer({}, files.bos_id, files.eos_id)
    small = {
        CONFIG: as_json(hf_config(files.model, files.seq_len, dtype, given.bos, given.eos, files.initializer_range)),
        GENERATION: as_json({"bos_token_id": given.bos, "eos_token_id": given.eos, "do_sample": True}),
        **given.files,
    }
    copies = tokenizer_copies(files).items()
    return small, {given.copy or name: path for name, path in copies if name not in small}


def _stored_tensors(folder: str) -> _Found:
    """Find the tensors in the files of an index or in a single file; safetensors take precedence over pickles."""
    for name, find in ((SAFETENSORS, safetensors_tensors), (BIN, torch_tensors)):
        path = os.path.join(folder, name)
        if os.path.lexists(path + INDEX):
            found = _Found(path + INDEX)
            for file, wanted in _files_of_index(check_file(path + INDEX)).items():
                tensors = find(check_file(os.path.join(folder, file)))
                check_names(os.path.join(folder, file), sorted(wanted), [n for n in tensors if n in wanted])
                found.tensors.update(tensors)
            return found
        if os.path.lexists(path):
            return _Found(path, find(check_file(path)))
    raise UserError(f"{folder}: contains neither {SAFETENSORS} nor {BIN}, nor an index of them; copy the model again")


def _files_of_index(path: str) -> dict[str, set[str]]:
    """Return the names of the tensors in each file of an index."""
    where = read_object(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{path}: contains no weight_map, so it is not the index of a model's files; copy it again")
    files: dict[str, set[str]] = {}
    for name, file in where.items():
        if not isinstance(file, str) or os.path.basename(file) != file or not file:
            raise UserError(
                f"{path}: puts {name} into {file!r}, which is not a file name in this folder; copy it again"
            )
        files.setdefault(file, set()).add(name)
    return files


def _drop_tied_head(folder: str, stored: dict[str, Stored]) -> None:
    """Drop a tied head that was written as a copy of the embedding."""
    embedding, head = stored.get(EMBEDDING), stored.get(HEAD)
    if head is None or embedding is None:
        return
    if not same(in_one_file(embedding, 0), in_one_file(head, 0)):
        raise UserError(
            f"{folder}: {CONFIG} has tie_word_embeddings = true, but {HEAD} differs from {EMBEDDING}; "
            "set it to false there"
        )
    del stored[HEAD]
