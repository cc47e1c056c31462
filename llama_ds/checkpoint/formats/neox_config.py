"""The configuration files of a GPT-NeoX run, which it copies into `configs/` of each checkpoint.

Each is a YAML mapping, and together they set an argument once. The defaults are those of megatron/neox_arguments of
github.com/EleutherAI/gpt-neox. The same YAML was read by another loader there, for which True is a boolean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llama_ds.checkpoint.formats.inventory import check_layers
from llama_ds.checkpoint.formats.meta_params import Unsaid
from llama_ds.checkpoint.formats.plain_llama import check_plain
from llama_ds.checkpoint.formats.plan import Target, as_json
from llama_ds.checkpoint.weights import ModelFiles
from llama_ds.config.reader import ConfigSource, read
from llama_ds.config.schema import ModelConfig, TrainingConfig
from llama_ds.config.text import read_yaml
from llama_ds.errors import UserError, listed

CONFIGS = "configs"
SUFFIXES = (".yml", ".yaml", ".json")
# Arguments that must be set, because their defaults make another model, with the values that make a LLaMA.
WANTED: dict[str, tuple[object, ...]] = {
    "norm": ("rmsnorm",),
    "pos_emb": ("rotary",),
}
# Arguments that make another model, with the values that change nothing; neither does null, or their absence.
NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("gpt_j_residual", "gpt_j_tied", "use_qk_layernorm", "use_mup", "te_mha", "te_fp8_mha"), (False,)),
    **dict.fromkeys(("te_columnparallel", "te_rowparallel", "te_layernorm_mlp"), (False,)),
    **dict.fromkeys(("rotary_pct", "num_experts", "moe_num_experts"), (1,)),
    **dict.fromkeys(("sliding_window_width", "soft_prompt_tuning"), ()),
    "use_bias_in_attn_linear": (False,),  # the default is True; then the tensors say whether there are biases
    "opt_pos_emb_offset": (0,),
    "train_impl": ("normal", "dpo", "kto", "reinforce"),
    "output_layer_parallelism": ("column",),
}
SILU = ("silu", "swish")  # activations that are one function
PLAIN_ATTENTION = ("global", "flash")
HEADS = "num_attention_heads"
BASE, EPSILON = 10_000.0, 1e-8  # defaults of rotary_emb_base and rms_norm_epsilon
BOOLEANS = {"True": True, "TRUE": True, "False": False, "FALSE": False}  # words of YAML 1.1


@dataclass(frozen=True)
class NeoxShapes:
    """What the tensors say of a model."""

    rows: int  # rows of the embedding
    intermediate_size: int
    fused: bool  # gate and up are one matrix
    tp: int


def read_configs(where: str) -> tuple[str, dict[str, Any]]:
    """Return the folder of the configuration files of a checkpoint, and the arguments that they set.

    Raises:
        UserError: there are none, one is damaged, or two set an argument.
    """
    folder = os.path.join(where, CONFIGS)
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    paths = [os.path.join(folder, name) for name in names if name.endswith(SUFFIXES)]
    if not paths:
        raise UserError(
            f"{where}: contains no {CONFIGS}/*.yml, which describe the model; copy the configuration files of the "
            f"GPT-NeoX run to {folder}"
        )
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for path in paths:
        for name, value in read_yaml(path).items():
            key = str(name).replace("-", "_")
            if key in found:
                raise UserError(f"{path}: {key} is set in {origin[key]}, too; remove one of the files")
            found[key] = BOOLEANS.get(value, value) if isinstance(value, str) else value
            origin[key] = path
    return (paths[0] if len(paths) == 1 else folder), found


def model_of(source: ConfigSource, given: Mapping[str, Any], shapes: NeoxShapes) -> ModelConfig:
    """Return the model.

    Raises:
        UserError: an argument is missing, invalid or not supported; the message names it.
    """
    _check_supported(source, given, shapes)
    layers, hidden, heads = (needed(source, given, key, int) for key in ("num_layers", "hidden_size", HEADS))
    if heads < 1 or hidden % heads:
        raise source.error(HEADS, f"= {heads} does not divide hidden_size = {hidden}; copy the file again")
    shape = {
        "vocab_size": shapes.rows,
        "hidden_size": hidden,
        "intermediate_size": shapes.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": optional(source, given, "num_kv_heads", int, heads) or heads,
        "head_dim": hidden // heads,
        "rms_norm_eps": optional(source, given, "rms_norm_epsilon", float, EPSILON),
        "rope_theta": optional(source, given, "rotary_emb_base", float, BASE),
        "tie_word_embeddings": not optional(source, given, "no_weight_tying", bool, False),
    }
    model = read(ModelConfig, shape, source)
    check_layers(source.path, model)
    return model


def seq_len_of(source: ConfigSource, given: Mapping[str, Any], unsaid: Unsaid) -> int:
    """Return the longest sequence that the model was trained for, in tokens."""
    return unsaid.seq_len or needed(source, given, "max_position_embeddings", int)


def initializer_range_of(source: ConfigSource, given: Mapping[str, Any]) -> float:
    """Return the standard deviation of the initial weights."""
    found: float = optional(source, given, "init_method_std", float, TrainingConfig.initializer_range)
    return found


def check_args(path: str, args: object, found: Mapping[str, int], where: str) -> None:
    """Check that arguments recorded in an engine's file are those of the configuration files and tensors.

    Raises:
        UserError: one differs; the message has both values.
    """
    recorded = args if isinstance(args, dict) else {}
    for key, value in found.items():
        if recorded.get(key) not in (None, value):
            raise UserError(
                f"{path}: args.{key} = {recorded[key]}, {where} and the tensors say {value}; copy the configuration "
                "files of the run that saved this checkpoint"
            )


def configuration(files: ModelFiles, target: Target) -> bytes:
    """Return a configuration file of a model, which GPT-NeoX reads.

    Raises:
        UserError: GPT-NeoX does not compute the model.
    """
    model, path = files.model, files.path
    check_plain(model, path, "GPT-NeoX")
    if model.rope_scaling is not None:
        raise UserError(f"{path}: model.rope_scaling is not computed by GPT-NeoX; convert to hf or deepspeed")
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        raise UserError(
            f"{path}: head_dim = {model.head_dim}, GPT-NeoX has hidden_size {model.hidden_size} / num_attention_heads "
            f"{model.num_attention_heads}; convert to hf or deepspeed"
        )
    theta = model.rope_theta
    if not theta.is_integer():
        raise UserError(f"{path}: rope_theta = {theta}, GPT-NeoX takes an integer; convert to hf or deepspeed")
    grouped = model.num_key_value_heads != model.num_attention_heads
    return as_json(
        {
            "pipe_parallel_size": target.pp,
            "model_parallel_size": target.tp,
            # The tables are padded to a multiple of this and model_parallel_size: to the rows that they have.
            "make_vocab_size_divisible_by": model.vocab_size // target.tp,
            "num_layers": model.num_hidden_layers,
            "hidden_size": model.hidden_size,
            HEADS: model.num_attention_heads,
            **({"num_kv_heads": model.num_key_value_heads} if grouped else {}),
            # GPT-NeoX takes two thirds of it for gate and up together, and rounds up to twice mlp_multiple_of.
            "intermediate_size": 3 * model.intermediate_size,
            "mlp_multiple_of": 1,
            "activation": "swiglu",
            "seq_length": files.seq_len,
            "max_position_embeddings": files.seq_len,
            "pos_emb": "rotary",
            "rotary_pct": 1.0,
            "rotary_emb_base": int(theta),
            "norm": "rmsnorm",
            "rms_norm_epsilon": model.rms_norm_eps,
            "no_weight_tying": not model.tie_word_embeddings,
            "use_bias_in_norms": False,
            "use_bias_in_attn_linear": False,
            "use_bias_in_mlp": False,
            "gpt_j_residual": False,
            "output_layer_parallelism": "column",
            "init_method_std": files.initializer_range,
            "finetune": True,
        }
    )


def needed(source: ConfigSource, given: Mapping[str, Any], key: str, kind: type) -> Any:
    """Return an argument that has no default.

    Raises:
        UserError: it is missing or of another type.
    """
    if given.get(key) is None:
        raise source.error(key, "is missing and has no default; copy all configuration files of the run")
    return read(kind, given[key], source, key)


def optional(source: ConfigSource, given: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """Return an argument, or its default where the files do not set it.

    Raises:
        UserError: it is of another type.
    """
    return default if given.get(key) is None else read(kind, given[key], source, key)


def _check_supported(source: ConfigSource, given: Mapping[str, Any], shapes: NeoxShapes) -> None:
    # Before gate and up were one matrix, `mlp_type: llama` had the activation of the gate alone, and never biases.
    wanted = {**WANTED, "activation": ("swiglu",) if shapes.fused else SILU}
    for key, values in wanted.items():
        if given.get(key) is None:
            raise source.error(key, f"is missing, and its default makes another model (of a LLaMA: {listed(values)})")
    bias = {"use_bias_in_mlp": (False,)} if shapes.fused else {}
    for key, values in {**NEUTRAL, **bias, **wanted}.items():
        found = given.get(key)
        if found is not None and not (isinstance(found, bool | int | float | str) and found in values):
            what = f" (of a LLaMA: {listed(values)})" if values else ""
            raise source.error(key, f"= {found!r} makes a model that is not a plain LLaMA{what}; give a plain one")
    if other := sorted(set(_words(given.get("attention_config"))) - set(PLAIN_ATTENTION)):
        raise source.error(
            "attention_config", f"has {other[0]}, not {listed(PLAIN_ATTENTION)}; give a model of plain attention"
        )


def _words(value: object) -> Iterator[str]:
    """Yield the words of a nested list, such as [[["flash"], 32]]."""
    if isinstance(value, str):
        yield value
    for inner in value if isinstance(value, list) else []:
        yield from _words(inner)
