"""Conversion of a checkpoint to Hugging Face's LlamaForCausalLM format: safetensors, config, tokenizer.

The names and the rotary layout inside the model are Hugging Face's, so conversion merges shards and renames.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_ds.checkpoint.hf_tokenizer import tokenizer_config
from llama_ds.checkpoint.names import hf_name
from llama_ds.checkpoint.store import TOKENIZER, Description
from llama_ds.checkpoint.weights import DTYPES, CheckpointWeights
from llama_ds.errors import UserError

SHARD_BYTES = 5 * 10**9  # transformers' own limit per file
COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "initializer_range", "tie_word_embeddings"),
)


def export(
    source: str,
    destination: str,
    tokenizer: dict[str, Any] | None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Description:
    """Convert checkpoint folder `source` to a Hugging Face model folder.

    Args:
        tokenizer: content of tokenizer.json (`hf_tokenizer.tokenizer_json`); None leaves only the sentencepiece model.
        dtype: fp32 or bf16; None keeps the one the run computed in, so the export computes what training did.
        progress: called with (layers written, layers in all).

    Raises:
        UserError: for a broken source or a destination that exists. A failed export leaves no destination.
    """
    if os.path.exists(destination) and not overwrite:
        raise UserError(f"{destination}: exists already; give another folder or --overwrite")
    weights = CheckpointWeights(source)
    description = weights.description
    parent = os.path.dirname(os.path.abspath(destination))
    os.makedirs(parent, exist_ok=True)
    work = tempfile.mkdtemp(prefix=os.path.basename(destination) + ".", dir=parent)
    try:
        chosen = DTYPES[dtype or description.dtype]
        _write_weights(weights, work, chosen, progress)
        _write_json(work, "config.json", hf_config(description.run, str(chosen).removeprefix("torch.")))
        _write_json(work, "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True})
        _write_tokenizer(os.path.join(source, TOKENIZER), tokenizer, work)
        os.chmod(work, 0o755)
        if os.path.exists(destination):
            shutil.rmtree(destination)
        os.rename(work, destination)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return description


def hf_config(run: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return config.json for transformers' LlamaConfig, from a resolved run; dtype in torch's words: float32."""
    model, seq_len = run["model"], run["data"]["seq_len"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model["rope_theta"]}
    if model["rope_scaling"]:
        rope.update(model["rope_scaling"], rope_type="llama3")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: model[key] for key in COPIED},
        "rope_parameters": rope,
        "rope_theta": model["rope_theta"],  # readers older than transformers 5 look here
        "rope_scaling": rope if model["rope_scaling"] else None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": seq_len,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _write_weights(
    weights: CheckpointWeights, folder: str, dtype: torch.dtype, progress: Callable[[int, int], None]
) -> None:
    """Write safetensors files of at most SHARD_BYTES (or one layer), holding one of them in memory at a time."""
    layers = weights.description.run["model"]["num_hidden_layers"]
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        if pending:
            shards.append(list(pending))
            save_file(pending, os.path.join(folder, f"part-{len(shards)}"), metadata={"format": "pt"})
            pending.clear()

    for index, state in weights:
        named = {hf_name(index, name, layers): w.to(dtype).contiguous() for name, w in state.items()}
        if _bytes(pending) + _bytes(named) > SHARD_BYTES:
            flush()
        pending.update(named)
        total += _bytes(named)
        progress(index + 1, weights.layers)
    flush()
    _name_shards(folder, shards, total)


def _name_shards(folder: str, shards: list[list[str]], total: int) -> None:
    count = len(shards)
    if count == 1:
        os.rename(os.path.join(folder, "part-1"), os.path.join(folder, "model.safetensors"))
        return
    where = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        os.rename(os.path.join(folder, f"part-{number}"), os.path.join(folder, file))
        where.update(dict.fromkeys(names, file))
    _write_json(folder, "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _write_tokenizer(model: str, content: dict[str, Any] | None, folder: str) -> None:
    shutil.copyfile(model, os.path.join(folder, TOKENIZER))
    if content is not None:
        _write_json(folder, "tokenizer.json", content)
        _write_json(folder, "tokenizer_config.json", tokenizer_config())


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _write_json(folder: str, name: str, content: dict[str, Any]) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
