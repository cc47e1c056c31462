"""Reading and writing config.json of transformers' LlamaForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM.

MistralForCausalLM without a sliding window is a LLaMA, and becomes one. Qwen2 is LLaMA with biases of q, k and v; Qwen3
has norms of queries and keys, and biases of q, k, v and o if asked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from llama_ds.checkpoint.formats.hf_settings import TOKEN_IDS, check_settings
from llama_ds.checkpoint.formats.inventory import check_file, check_layers
from llama_ds.config.reader import ConfigSource, read
from llama_ds.config.schema import ModelConfig, TrainingConfig
from llama_ds.config.section_rules import ROPE_KEYS
from llama_ds.errors import UserError, listed

CONFIG = "config.json"
COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"),
)
# Not carried along: code of other models, and names of folders.
DROPPED = ("auto_map", "_name_or_path", "quantization_config", "torch_dtype", "dtype")
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MISTRAL = "mistral"
# Settings that can make these models differ from this project's, with the values for which they do not.
SUPPORTED: dict[str, tuple[object, ...]] = {
    "model_type": (*ARCHITECTURES, MISTRAL),
    "hidden_act": ("silu", "swish", None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
}
# Defaults of transformers for keys that a file leaves out, where they differ from those of LlamaConfig.
DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"max_position_embeddings": 2048},
    MISTRAL: {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
ORIGINAL = "original_max_position_embeddings"


def hf_config(
    model: ModelConfig,
    seq_len: int,
    dtype: str,
    bos: int | None = None,
    eos: int | None = None,
    initializer_range: float = TrainingConfig.initializer_range,
) -> dict[str, Any]:
    """Return the content of config.json, also valid as the configuration's arguments. `dtype` is torch's: float32.

    Raises:
        UserError: no architecture of transformers has this number of heads, this combination of biases and norms, or
            factors of muP, which `folded` puts into weights.
    """
    if model.mup:
        raise UserError(
            "model.mup: no model of transformers has its factors of logits and attention scores; compare a model "
            "without it, or convert the trained one with tools/convert.py, which folds them into weights"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling:
        rope.update(model.rope_scaling.parameters(), rope_type=model.rope_scaling.rope_type)
    if rope["rope_type"] == "dynamic":
        del rope[ORIGINAL]  # it is max_position_embeddings
    kind = _model_type(model)
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{key: getattr(model, key) for key in COPIED},
        "initializer_range": initializer_range,
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,  # transformers before version 5 reads this key
        "rope_scaling": rope if model.rope_scaling else None,
        "hidden_act": "silu",
        **({} if kind == "qwen2" else {"attention_bias": model.attention_bias == "qkvo"}),
        **({"mlp_bias": model.mlp_bias} if kind == "llama" else {"use_sliding_window": False}),
        "max_position_embeddings": _longest(model, seq_len),
        "bos_token_id": bos,
        "eos_token_id": eos,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _model_type(model: ModelConfig) -> str:
    """Return transformers' name of a model's architecture."""
    bias = model.attention_bias
    kind = "qwen3" if model.qk_norm else "qwen2" if bias == "qkv" else "llama"
    if (kind == "qwen3" and bias == "qkv") or (kind != "llama" and model.mlp_bias):
        raise UserError(
            f"model.attention_bias = {bias}, model.mlp_bias = {str(model.mlp_bias).lower()}, model.qk_norm = "
            f"{str(model.qk_norm).lower()}: no model of transformers has all of these (Llama: qkvo and mlp_bias; "
            "Qwen2: qkv; Qwen3: qk_norm, also with qkvo); convert to deepspeed"
        )
    if kind == "llama" and model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"model.hidden_size = {model.hidden_size} is no multiple of model.num_attention_heads = "
            f"{model.num_attention_heads}, which {ARCHITECTURES[kind]} of transformers requires; convert to deepspeed"
        )
    return kind


def _longest(model: ModelConfig, seq_len: int) -> int:
    """Return max_position_embeddings, by which transformers scales rotary frequencies of two kinds.

    It is the original length of dynamic, and the scaled one of yarn: version 4 computes the factor from it.
    """
    scaling = model.rope_scaling
    if scaling is None or scaling.original_max_position_embeddings is None or scaling.rope_type == "llama3":
        return seq_len
    original = scaling.original_max_position_embeddings
    return original if scaling.rope_type == "dynamic" else round(scaling.factor * original)


def read_config(folder: str) -> dict[str, Any]:
    """Return the content of a folder's config.json, checked to describe an architecture that this project supports.

    Raises:
        UserError: the file is missing or damaged, or a setting is not supported; the message names it.
    """
    path = check_file(os.path.join(folder, CONFIG))
    config = read_object(path)
    _check_not_quantized(path, config)
    for key, values in SUPPORTED.items():
        if config.get(key) not in values or (key == "model_type" and key not in config):
            raise UserError(
                f"{path}: {key} = {json.dumps(config.get(key))}, this project's models have "
                f"{listed(json.dumps(value) for value in values if value is not None or len(values) == 1)}; "
                "give a model of that architecture"
            )
    check_settings(path, config)
    config = DEFAULTS[config["model_type"]] | config
    _check_windows(path, config)
    return config


def _check_not_quantized(path: str, config: Mapping[str, Any]) -> None:
    found = config.get("quantization_config")
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise UserError(
            f"{path}: quantization_config: the weights are quantised ({method}) and cannot be trained; give the model "
            "from which they were made"
        )


def _check_windows(path: str, config: Mapping[str, Any]) -> None:
    """Check that every layer attends to all earlier tokens; Qwen's sliding_window counts if use_sliding_window does."""
    window = config.get("sliding_window")
    if window is not None and config["model_type"] in ("llama", MISTRAL):
        raise UserError(
            f"{path}: sliding_window = {json.dumps(window)} (of Mistral the default is 4096), this project attends to "
            "all earlier tokens; give a model that does"
        )


def _biases_and_norms(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of ModelConfig in which the supported architectures differ."""
    kind, biased = config["model_type"], config.get("attention_bias") or False
    return {
        "attention_bias": "qkv" if kind == "qwen2" else "qkvo" if biased and kind != MISTRAL else "none",
        "mlp_bias": kind == "llama" and bool(config.get("mlp_bias")),
        "qk_norm": kind == "qwen3",
    }


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
    # Where these are null, transformers takes a default, except for the norms' constant.
    given = {key: config[key] for key in COPIED if key in config and (config[key] is not None or key == "rms_norm_eps")}
    source = ConfigSource(path)
    hidden, heads = (
        read(int, given[key], source, key) if key in given else 1 for key in ("hidden_size", "num_attention_heads")
    )
    given.setdefault("num_key_value_heads", heads)
    given.setdefault("head_dim", hidden // max(heads, 1))
    given.setdefault("rms_norm_eps", 1e-6)  # LlamaConfig's default
    model = read(ModelConfig, {**given, **_rotary(path, config), **_biases_and_norms(config)}, source)
    seq_len = read(int, config["max_position_embeddings"], source, "max_position_embeddings")
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
    _check_one_rope(path, config)
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise UserError(
            f"{path}: rope_parameters.{nested[0]}: kinds of layers have rotary embeddings of their own there, this "
            "project's have one; give a model with one"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        raise UserError(
            f"{path}: rope_type = {json.dumps(kind)} beside type = {json.dumps(rope['type'])}, and which counts "
            "depends on the version of transformers; remove one"
        )
    theta = rope.get("rope_theta", config.get("rope_theta"))
    found: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    if kind != "default" and kind not in ROPE_KEYS:
        raise UserError(
            f"{path}: rope_type = {json.dumps(kind)}, this project computes {listed(('default', *ROPE_KEYS))}; "
            "give a model with one of these"
        )
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"{path}: partial_rotary_factor = {rope['partial_rotary_factor']}, this project rotates entire heads"
        )
    if kind != "default":
        found["rope_scaling"] = {"rope_type": kind, **_scaling(kind, rope, config)}
    return found


def _check_one_rope(path: str, config: Mapping[str, Any]) -> None:
    """Refuse two descriptions of the rotary embedding that differ: versions of transformers read different ones."""
    new, old = (_with_kind(config.get(key) or {}) for key in ("rope_parameters", "rope_scaling"))
    theta = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    for key, other in (("rope_scaling", old), ("rope_theta", theta)):
        both = new.keys() & other.keys() if key == "rope_theta" else (new.keys() | other.keys()) - {"rope_theta"}
        if new and other and (differing := sorted(name for name in both if new.get(name) != other.get(name))):
            name = differing[0]
            raise UserError(
                f"{path}: rope_parameters has {name} = {json.dumps(new.get(name))}, {key} has "
                f"{json.dumps(other.get(name))}, and which counts depends on the version of transformers; remove one"
            )


def _with_kind(rope: Any) -> dict[str, Any]:
    """Return a description of the rotary embedding with the present name of its kind; {}: it is none."""
    if not isinstance(rope, dict) or "type" not in rope:
        return rope if isinstance(rope, dict) else {}
    return {"rope_type": rope["type"], **{key: value for key, value in rope.items() if key != "type"}}


def _scaling(kind: str, rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a kind of scaling, with the original length where transformers takes it from."""
    required, optional = ROPE_KEYS[kind]
    found = {key: rope[key] for key in ("factor", *required, *optional) if rope.get(key) is not None}
    if kind == "yarn" and rope.get("truncate", True) is None:
        found["truncate"] = False  # as transformers reads null
    if kind == "yarn" and ORIGINAL in config:
        found[ORIGINAL] = config[ORIGINAL]
    elif kind == "dynamic" or (kind == "yarn" and ORIGINAL not in found):
        found[ORIGINAL] = config["max_position_embeddings"]
    return found
