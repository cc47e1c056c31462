"""Reading and writing config.json of transformers' LlamaForCausalLM."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from llama_ds.checkpoint.formats.hf_settings import TOKEN_IDS, check_settings
from llama_ds.checkpoint.formats.inventory import check_file, check_layers
from llama_ds.config.reader import ConfigSource, read
from llama_ds.config.schema import ModelConfig, TrainingConfig
from llama_ds.errors import UserError

CONFIG = "config.json"
COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"),
)
# Not carried along: code of other models, and names of folders.
DROPPED = ("auto_map", "_name_or_path", "quantization_config", "torch_dtype", "dtype")
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Settings that can make a LlamaForCausalLM differ from this project's model, with the values for which it does not.
SUPPORTED: dict[str, tuple[object, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, 1.0, None),
}


def hf_config(
    model: ModelConfig,
    seq_len: int,
    dtype: str,
    bos: int | None = None,
    eos: int | None = None,
    initializer_range: float = TrainingConfig.initializer_range,
) -> dict[str, Any]:
    """Return the content of config.json, also valid as LlamaConfig's arguments. `dtype` is torch's name: float32."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling:
        rope.update(asdict(model.rope_scaling), rope_type="llama3")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(model, key) for key in COPIED},
        "initializer_range": initializer_range,
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,  # transformers before version 5 reads this key
        "rope_scaling": rope if model.rope_scaling else None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": seq_len,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def read_config(folder: str) -> dict[str, Any]:
    """Return the content of a folder's config.json, checked to describe an architecture that this project supports.

    Raises:
        UserError: the file is missing or damaged, or a setting is not supported; the message names it.
    """
    path = check_file(os.path.join(folder, CONFIG))
    config = read_object(path)
    for key, values in SUPPORTED.items():
        if config.get(key) not in values or (key == "model_type" and key not in config):
            raise UserError(
                f"{path}: {key} = {json.dumps(config.get(key))}, this project's LLaMA has {json.dumps(values[0])}; "
                "give a model of that architecture"
            )
    check_settings(path, config)
    return config


def continued(source: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with what else the config.json that the weights came from holds, and with its token ids."""
    ids = {key: source[key] for key in TOKEN_IDS if key in source}
    # Without a key of an id, transformers has a default, which is not null.
    ours = {key: value for key, value in config.items() if key not in TOKEN_IDS}
    return {key: value for key, value in source.items() if key not in DROPPED} | ours | ids


def model_of(folder: str, config: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """Return the model that config.json describes, and the longest sequence that it was trained for.

    Raises:
        UserError: a number is missing or invalid, or the rotary embedding is not supported.
    """
    path = os.path.join(folder, CONFIG)
    given = {key: config[key] for key in COPIED if config.get(key) is not None}
    heads = given.get("num_attention_heads")
    given.setdefault("num_key_value_heads", heads)
    if isinstance(heads, int) and isinstance(given.get("hidden_size"), int) and heads > 0:
        given.setdefault("head_dim", given["hidden_size"] // heads)
    given.setdefault("rms_norm_eps", 1e-6)  # LlamaConfig's default
    source = ConfigSource(path)
    model = read(ModelConfig, {**given, **_rotary(path, config)}, source)
    seq_len = read(int, config.get("max_position_embeddings", 2048), source, "max_position_embeddings")
    check_layers(path, model)
    return model, seq_len


def initializer_range_of(folder: str, config: Mapping[str, Any]) -> float:
    """Return initializer_range of config.json, by default that of transformers.

    Raises:
        UserError: it is not a number.
    """
    value = config.get("initializer_range")
    path = os.path.join(folder, CONFIG)
    return 0.02 if value is None else read(float, value, ConfigSource(path), "initializer_range")


def read_object(path: str) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        UserError: the file cannot be read as a JSON object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError(f"holds {type(content).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); copy it again") from None
    return content


def _rotary(path: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta and rope_scaling for ModelConfig; transformers 5 writes both into rope_parameters."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters = {json.dumps(rope)} is not an object; copy the file again")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", config.get("rope_theta"))
    found: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    if kind not in ("default", "llama3"):
        raise UserError(
            f"{path}: rope_type = {json.dumps(kind)}, this project computes default and llama3; "
            "give a model with one of these"
        )
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"{path}: partial_rotary_factor = {rope['partial_rotary_factor']}, this project rotates entire heads"
        )
    if kind == "llama3":
        found["rope_scaling"] = {key: rope[key] for key in SCALING if key in rope}
    return found
