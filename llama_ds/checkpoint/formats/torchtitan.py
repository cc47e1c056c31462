"""torchtitan's checkpoints of a LLaMA 3, which torch's DCP saves (`dcp`).

    step-1000/.metadata, step-1000/__0_0.distcp, ...

The names are Meta's, as in `meta`, and so is the order of the rows of query and key heads. Later releases call the head
`lm_head` and have `qkv_linear` before the three projections. States of the training (`optimizer`, `train_state`,
`dataloader`, ...) are beside the weights. The model's settings are not in a checkpoint: a params.json of Meta's form
that the user adds has them.

Sources: torchtitan/models/llama3/state_dict_adapter.py and torchtitan/components/checkpointer of
github.com/pytorch/torchtitan.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llama_ds.checkpoint.formats.dcp import METADATA, STEP, DcpTensor, dcp_tensors
from llama_ds.checkpoint.formats.inventory import check_names, check_shape, model_files, same, vocabulary_tables
from llama_ds.checkpoint.formats.meta import EMBEDDING, HEAD, meta_name
from llama_ds.checkpoint.formats.meta_params import PARAMS, Unsaid, model_of, read_params
from llama_ds.checkpoint.formats.views import ROTATED, RotaryReordered
from llama_ds.checkpoint.weights import ModelFiles, Readable, tokenizer_in
from llama_ds.config.reader import ConfigSource, read
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError
from llama_ds.layout.weights import Key, weight_of, weight_shapes

# Beginnings of the names of what is no weight.
STATES = ("optimizer.", "optim.", "lr_scheduler.", "train_state.", "dataloader.", "ema.", "rng.")
PREFIX = "model."
SEGMENTS = re.compile(r"\b(_checkpoint_wrapped_module|_orig_mod|qkv_linear)\.")
FREQUENCIES = "freqs_cis"
LAYER = re.compile(r"layers\.(\d{1,6})\.")
GATE = "layers.0.feed_forward.w1.weight"
EXAMPLE = '{"n_heads": 32, "rope_theta": 500000.0, "use_scaled_rope": false, "norm_eps": 1e-05, "max_seq_len": 8192}'
NEEDED = ("n_heads", "rope_theta", "use_scaled_rope", "norm_eps")


def open_torchtitan(folder: str, vocab_size: int | None = None, unsaid: Unsaid | None = None) -> ModelFiles:
    """Return the weights of a torchtitan checkpoint.

    Args:
        folder: a checkpoint, step-N, or the folder of several, of which the newest is taken.
        vocab_size: rows of the vocabulary tables; None: those of the checkpoint.
        unsaid: what params.json does not say.

    Raises:
        UserError: a tensor is missing, unknown or misshapen, a file is damaged, or settings of the model are needed.
    """
    unsaid, where = unsaid or Unsaid(), _checkpoint_in(folder)
    found, dropped = _weights(dcp_tensors(where))
    head = found.get(HEAD)
    params, config = _params(folder, where, found, unsaid)
    untied = _model(config, params, found, head is not None, unsaid)
    names = {key: meta_name(*key, untied.num_hidden_layers) for key in weight_shapes(untied)}
    check_names(where, list(names.values()), found)
    tensors = {key: _tensor(where, found[name], key, name, untied) for key, name in names.items()}
    model = _with_tied(untied, tensors)
    tensors = {key: tensors[key] for key in weight_shapes(model)}
    seq_len = unsaid.seq_len or read(int, params["max_seq_len"], ConfigSource(config), "max_seq_len")
    files = model_files(folder, where, config, names, model, seq_len, tensors, vocab_size)
    return replace(files, tokenizer=files.tokenizer or tokenizer_in(where), notes=dropped)


def _checkpoint_in(folder: str) -> str:
    """Return the newest checkpoint in a folder, or the folder itself."""
    names = os.listdir(folder)
    steps = {int(match[1]): name for name in names if (match := STEP.fullmatch(name))}
    complete = [step for step in steps if os.path.lexists(os.path.join(folder, steps[step], METADATA))]
    return os.path.join(folder, steps[max(complete)]) if METADATA not in names and complete else folder


def _weights(tensors: Mapping[str, DcpTensor]) -> tuple[dict[str, DcpTensor], tuple[str, ...]]:
    """Return the weights by Meta's names, and a note on what else is dropped."""
    found, dropped = {}, []
    for name, tensor in tensors.items():
        if name.startswith(STATES):
            continue
        local = SEGMENTS.sub("", name.removeprefix(PREFIX))
        if local == FREQUENCIES:
            dropped.append(f"{tensor.folder}: {name}: rotary frequencies, which follow from rope_theta: dropped")
            continue
        found[HEAD if local == "lm_head.weight" else local] = tensor
    return found, tuple(dropped)


def _params(folder: str, where: str, found: Mapping[str, DcpTensor], unsaid: Unsaid) -> tuple[dict[str, Any], str]:
    """Return params.json with the sizes that the tensors have, and its path."""
    place = next((place for place in (where, folder) if os.path.lexists(os.path.join(place, PARAMS))), None)
    if place is None:
        raise UserError(
            f"{where}: does not say the heads, rotary embedding and norms of its model; write them to "
            f"{os.path.join(where, PARAMS)}: {EXAMPLE}"
        )
    given, source = read_params(place), ConfigSource(os.path.join(place, PARAMS))
    needed = (*NEEDED, *(() if unsaid.seq_len else ("max_seq_len",)))
    if missing := [key for key in needed if given.get(key) is None]:
        raise source.error(missing[0], f"is missing, and the checkpoint does not say it; for example {EXAMPLE}")
    layers = {int(match[1]) for name in found if (match := LAYER.match(name))}
    table = found.get(EMBEDDING)
    if table is None or len(table.shape) != 2 or GATE not in found or len(found[GATE].shape) != 2:
        raise UserError(f"{where}: has no {EMBEDDING} or {GATE}, so it is no LLaMA of torchtitan; give one")
    sizes = {"dim": table.shape[1], "n_layers": max(layers) + 1, "vocab_size": table.shape[0]}
    for key, value in sizes.items():
        if given.get(key) not in (None, -1, value):
            raise source.error(key, f"= {given[key]}, the tensors have {value}; correct it")
    return {**given, **sizes}, source.path


def _model(
    config: str, params: Mapping[str, Any], found: Mapping[str, DcpTensor], untied: bool, unsaid: Unsaid
) -> ModelConfig:
    model = model_of(os.path.dirname(config), params, params["vocab_size"], tied=not untied, unsaid=unsaid)
    return replace(model, intermediate_size=found[GATE].shape[0])


def _tensor(where: str, tensor: DcpTensor, key: Key, name: str, model: ModelConfig) -> Readable:
    weight = weight_of(key[1])
    check_shape(where, name, tensor.shape, weight.shape(model), PARAMS)
    whole = tensor.readable(weight.cut)
    return RotaryReordered(whole, model.head_dim, to_halves=True) if key[1] in ROTATED else whole


def _with_tied(model: ModelConfig, tensors: Mapping[Key, Readable]) -> ModelConfig:
    """Return the model, tied if its head equals the embedding bit for bit."""
    tables = [tensors[key] for key in vocabulary_tables(model)]
    return replace(model, tie_word_embeddings=len(tables) == 1 or same(tables[0], tables[1]))
