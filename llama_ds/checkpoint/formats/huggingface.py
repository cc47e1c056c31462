"""Hugging Face's format of a LLaMA: safetensors or pytorch_model*.bin, config.json and tokenizer files.

This project's rotary layout and local weight names are Hugging Face's, so conversion only merges shards and renames.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llama_ds.checkpoint.carried import GENERATION, TOKENIZER, TOKENIZER_JSON, carried_files
from llama_ds.checkpoint.choices import SHARDED
from llama_ds.checkpoint.formats.frequencies import dropped_frequencies
from llama_ds.checkpoint.formats.hf_config import (
    CONFIG,
    continued,
    hf_config,
    initializer_range_of,
    model_of,
    read_config,
)
from llama_ds.checkpoint.formats.hf_folder import ADAPTERS, INDEX, SAFETENSORS, folder_tensors, refuse_adapter
from llama_ds.checkpoint.formats.hf_settings import TOKEN_IDS
from llama_ds.checkpoint.formats.inventory import check_names, model_files, same
from llama_ds.checkpoint.formats.plan import OutputFile, OutputTensor, Plan, Target, as_json
from llama_ds.checkpoint.names import hf_name
from llama_ds.checkpoint.spread import in_one_file
from llama_ds.checkpoint.stored import Stored
from llama_ds.checkpoint.weights import DTYPES, ModelFiles, Readable
from llama_ds.errors import UserError
from llama_ds.layout.weights import Key, weight_of, weight_shapes

SHARD_BYTES = 5 * 10**9  # default limit per file in transformers up to version 4
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INVERSE_FREQUENCIES = re.compile(r".*\brotary_emb\.inv_freq")  # only in old exports; derived from rope_theta


@dataclass(frozen=True)
class HfTokenizer:
    """A tokenizer in the form that transformers reads."""

    files: Mapping[str, bytes]  # by name
    bos: int | None
    eos: int | None
    copy: str | None = None  # where a copy of the source's file goes; None: beside the weights


def open_huggingface(folder: str, vocab_size: int | None = None) -> ModelFiles:
    """Return the weights of a folder that transformers' LlamaForCausalLM can load.

    `vocab_size` resizes the vocabulary tables to that many rows; by default they must match config.json.

    Raises:
        UserError: the architecture is not supported, a tensor is missing, unknown or misshapen, or a file is damaged.
    """
    refuse_adapter(folder)
    config = read_config(folder)
    model, seq_len = model_of(folder, config)
    found = folder_tensors(folder, config)
    derived = {n: t for n, t in found.tensors.items() if INVERSE_FREQUENCIES.fullmatch(n)}
    stored = {n: t for n, t in found.tensors.items() if n not in derived}
    if model.tie_word_embeddings:
        _drop_tied_head(folder, stored)
    names = {key: hf_name(*key, model.num_hidden_layers) for key in weight_shapes(model)}
    check_names(found.path, names.values(), stored)
    tensors: dict[Key, Readable] = {key: in_one_file(stored[n], weight_of(key[1]).cut) for key, n in names.items()}
    files = model_files(folder, found.path, CONFIG, names, model, seq_len, tensors, vocab_size)
    eos = config.get("eos_token_id")
    return replace(
        files,
        initializer_range=initializer_range_of(folder, config),
        bos_id=config.get("bos_token_id"),
        eos_id=eos if isinstance(eos, int) else None,  # a chat model has several
        hf_config=config,
        notes=(*found.notes, *dropped_frequencies(found.path, derived, model, CONFIG)),
    )


def holds_huggingface(folder: str) -> bool:
    """Return whether a folder looks like a Hugging Face model, or an adapter of one."""
    return any(os.path.lexists(os.path.join(folder, name)) for name in (CONFIG, *ADAPTERS))


def plan_huggingface(files: ModelFiles, target: Target, tokenizer: HfTokenizer | None) -> Plan:
    """Return the plan: files of at most SHARD_BYTES (or a single larger layer), and the files AutoTokenizer reads.

    Files that came from a Hugging Face folder are copied, its config.json is continued. `tokenizer` is the source's,
    where the copied files do not suffice (`needs_tokenizer`); None: it has none that can be read.

    Raises:
        UserError: the target is sharded.
    """
    if (target.tp, target.pp) != (1, 1):
        raise UserError(f"command line: --tp and --pp apply only to {SHARDED}; leave them out for hf")
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


def needs_tokenizer(files: ModelFiles) -> bool:
    """Return whether AutoTokenizer would not load the model's tokenizer from the files that are carried along."""
    return not files.from_hf or TOKENIZER_JSON not in carried_files(files.path)


def _settings(files: ModelFiles, dtype: str, tokenizer: HfTokenizer | None) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return the small files: the contents of those to write, and the paths of those to copy."""
    given = tokenizer or HfTokenizer({}, files.bos_id, files.eos_id)
    config = hf_config(files.model, files.seq_len, dtype, given.bos, given.eos, files.initializer_range)
    if files.hf_config:
        config = continued(files.hf_config, config)
    _check_ids(files, config)
    small = {CONFIG: as_json(config), **given.files}
    copied = carried_files(files.path)
    if given.copy and TOKENIZER in copied:
        copied[given.copy] = copied.pop(TOKENIZER)
    if GENERATION not in copied and not files.from_hf:
        small[GENERATION] = as_json({key: config[key] for key in TOKEN_IDS[:2]} | {"do_sample": True})
    return small, {name: path for name, path in copied.items() if name not in small}


def _check_ids(files: ModelFiles, config: Mapping[str, Any]) -> None:
    """Check that all token ids have rows in the vocabulary tables; else transformers may not even load the model."""
    size = files.model.vocab_size
    for key in TOKEN_IDS:
        value = config.get(key)
        for index in value if isinstance(value, list) else [value]:
            if index is not None and index >= size:
                raise UserError(
                    f"{files.path}: {key} = {index} is not below vocab_size = {size}; convert with --vocab-size "
                    f"{index + 1} or more: missing rows become zeros"
                )


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
