"""The args of a Megatron-LM checkpoint: the namespace of its command line, which describes the model.

Source: megatron/training/arguments.py and checkpointing.py of github.com/NVIDIA/Megatron-LM. With --use-checkpoint-args
Megatron-LM takes most of them from the checkpoint; `flags_of` has the others.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llama_ds.checkpoint.formats.inventory import check_layers
from llama_ds.checkpoint.formats.meta_params import Unsaid
from llama_ds.checkpoint.formats.plain_llama import check_plain
from llama_ds.checkpoint.formats.plan import Target
from llama_ds.checkpoint.weights import DTYPES, ModelFiles
from llama_ds.config.reader import ConfigSource, read
from llama_ds.config.schema import ModelConfig, RopeScaling, TrainingConfig
from llama_ds.errors import UserError, listed

MULTIPLE = 128  # default of make_vocab_size_divisible_by
OLD_ROTARY_BASE = 10_000.0  # constant in releases without the argument rotary_base
SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)  # constants of use_rope_scaling; only the factor is an argument
# Arguments that must be there, with the values that make a LLaMA.
WANTED: dict[str, tuple[object, ...]] = {
    "position_embedding_type": ("rope",),
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
}
# Arguments that make another model, with the values that change nothing; neither does None, or their absence.
NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("add_qkv_bias", "qk_layernorm", "qk_l2_norm", "multi_latent_attention"), (False,)),
    **dict.fromkeys(("attention_output_gate", "apply_layernorm_1p", "layernorm_zero_centered_gamma"), (False,)),
    **dict.fromkeys(("apply_residual_connection_post_layernorm", "squared_relu", "quick_geglu"), (False,)),
    **dict.fromkeys(("is_hybrid_model", "retro_add_retriever", "use_mup"), (False,)),
    **dict.fromkeys(("rotary_percent", "rotary_seq_len_interpolation_factor", "expert_model_parallel_size"), (1,)),
    **dict.fromkeys(("num_experts", "mtp_num_layers", "no_rope_freq", "glu_linear_offset"), (0,)),
    **dict.fromkeys(("window_size", "window_attn_skip_freq", "mrope_section", "activation_func_clamp_value"), ()),
    **dict.fromkeys(("hybrid_layer_pattern", "hybrid_override_pattern", "experimental_attention_variant"), ()),
    **dict.fromkeys(("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json", "spec"), ()),
    **dict.fromkeys(("softmax_scale", "linear_attention_type"), ()),
    "softmax_type": ("vanilla",),
}


@dataclass(frozen=True)
class MegatronSettings:
    """What the args of a rank's file say."""

    model: ModelConfig
    seq_len: int
    tp: int  # tensor-parallel ranks
    pp: int  # pipeline stages
    padded_vocab_size: int  # rows of the vocabulary tables in the files
    interleaved: bool  # whether rotary pairs are adjacent rows
    initializer_range: float
    notes: tuple[str, ...] = ()


def settings_of(path: str, args: object, vocab_size: int | None, unsaid: Unsaid) -> MegatronSettings:
    """Return what `args` of the file `path` say.

    Args:
        vocab_size: of --vocab-size, used where the args have none.
        unsaid: what the args do not say.

    Raises:
        UserError: an argument is missing, invalid or not supported; the message names it.
    """
    if not isinstance(args, Namespace):
        raise UserError(f"{path}: holds no args, which describe the model; give a checkpoint that Megatron-LM saved")
    given, source = vars(args), ConfigSource(path)
    _check_supported(source, given)
    integers = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")
    layers, hidden, inner, heads, head_dim = (_needed(source, given, key, int) for key in integers)
    grouped = _optional(source, given, "group_query_attention", bool, False)
    padded = _needed(source, given, "padded_vocab_size", int)
    theta = _optional(source, given, "rotary_base", float, OLD_ROTARY_BASE)
    shape = {
        "vocab_size": _vocab_size(source, given, vocab_size, padded),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        # Without group_query_attention, num_query_groups has its default, 1, and is not used.
        "num_key_value_heads": _needed(source, given, "num_query_groups", int) if grouped else heads,
        "head_dim": head_dim,
        "rms_norm_eps": _needed(source, given, "norm_epsilon", float),
        "rope_theta": theta,
        "rope_scaling": _scaling(source, given, unsaid),
        "tie_word_embeddings": not _needed(source, given, "untie_embeddings_and_output_weights", bool),
    }
    model = read(ModelConfig, shape, source, "args")
    check_layers(path, model)
    note = f"rotary_base: {theta:g} assumed, as in releases of Megatron-LM without that argument"
    return MegatronSettings(
        model,
        seq_len=unsaid.seq_len or _needed(source, given, "max_position_embeddings", int),
        tp=_parts(source, given, "tensor_model_parallel_size"),
        pp=_parts(source, given, "pipeline_model_parallel_size"),
        padded_vocab_size=padded,
        interleaved=_optional(source, given, "rotary_interleaved", bool, False),
        initializer_range=_optional(source, given, "init_method_std", float, TrainingConfig.initializer_range),
        notes=() if given.get("rotary_base") is not None else (note,),
    )


def args_of(files: ModelFiles, target: Target, padded_vocab_size: int) -> Namespace:
    """Return the args of a model.

    Raises:
        UserError: the args do not express the model's biases, norms or rotary scaling.
    """
    model = files.model
    check_plain(model, files.path, "Megatron-LM with these args")
    scaling = model.rope_scaling
    if scaling is not None and asdict(scaling) | {"factor": 0} != asdict(SCALING) | {"factor": 0}:
        raise UserError(
            f"{files.path}: rope_scaling = {list(scaling.parameters().values())}, Megatron-LM has all but the first "
            f"built in: {list(SCALING.parameters().values())}; convert to hf or deepspeed"
        )
    theta = model.rope_theta
    return Namespace(
        **{key: values[0] for key, values in WANTED.items()},
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=model.num_key_value_heads != model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        norm_epsilon=model.rms_norm_eps,
        rotary_base=int(theta) if theta.is_integer() else theta,  # the flag takes an integer
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rotary_position_embeddings=True,
        add_position_embedding=False,
        use_rope_scaling=scaling is not None,
        rope_scaling_factor=(scaling or SCALING).factor,
        untie_embeddings_and_output_weights=not model.tie_word_embeddings,
        vocab_size=model.vocab_size,
        padded_vocab_size=padded_vocab_size,
        make_vocab_size_divisible_by=MULTIPLE,
        max_position_embeddings=files.seq_len,
        seq_length=files.seq_len,
        init_method_std=files.initializer_range,
        add_qkv_bias=False,
        squared_relu=False,
        qk_layernorm=False,
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        num_experts=None,
        tensor_model_parallel_size=target.tp,
        pipeline_model_parallel_size=target.pp,
        virtual_pipeline_model_parallel_size=None,
        expert_model_parallel_size=1,
        transformer_impl=target.transformer_impl,
        params_dtype=DTYPES[target.dtype],
        bf16=target.dtype == "bf16",
        fp16=target.dtype == "fp16",
        ckpt_format="torch",
        iteration=0,
    )


def flags_of(args: Namespace) -> str:
    """Return the flags that Megatron-LM needs beside --use-checkpoint-args, which does not set them."""
    scaling = f" --use-rope-scaling --rope-scaling-factor {args.rope_scaling_factor}" if args.use_rope_scaling else ""
    dtype = " --bf16" if args.bf16 else " --fp16" if args.fp16 else ""
    return (
        f"--tensor-model-parallel-size {args.tensor_model_parallel_size} "
        f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size} "
        f"--transformer-impl {args.transformer_impl} --norm-epsilon {args.norm_epsilon}{scaling}{dtype}"
    )


def _check_supported(source: ConfigSource, given: Mapping[str, Any]) -> None:
    for key in WANTED:
        if given.get(key) is None:
            raise _missing(source, key)
    for key, values in {**WANTED, **NEUTRAL}.items():
        found = given.get(key)
        if found is not None and not (isinstance(found, bool | int | float | str) and found in values):
            wanted = f" (of a LLaMA: {listed(values)})" if values else ""
            raise source.error(
                f"args.{key}", f"= {found!r} makes a model that is not a plain LLaMA{wanted}; give one of that model"
            )


def _vocab_size(source: ConfigSource, given: Mapping[str, Any], wanted: int | None, padded: int) -> int:
    found = _optional(source, given, "vocab_size", int, wanted)
    if found is None:
        raise source.error(
            "args.vocab_size",
            f"is missing, and some of the {padded} rows of the embedding are padding; convert with --vocab-size N, the "
            f"size of the tokenizer's vocabulary, or --vocab-size {padded} to keep all rows",
        )
    if wanted is None and found > padded:
        raise source.error("args.vocab_size", f"= {found} is above padded_vocab_size = {padded}; copy the file again")
    return found


def _scaling(source: ConfigSource, given: Mapping[str, Any], unsaid: Unsaid) -> dict[str, Any] | None:
    if not _optional(source, given, "use_rope_scaling", bool, False):
        return None
    factor = _optional(source, given, "rope_scaling_factor", float, unsaid.rope_factor)
    if factor is None:
        raise source.error(
            "args.rope_scaling_factor", "is missing; convert with --rope-factor 8 (Llama 3.1) or 32 (Llama 3.2)"
        )
    return asdict(SCALING) | {"factor": factor}


def _parts(source: ConfigSource, given: Mapping[str, Any], key: str) -> int:
    number: int = _needed(source, given, key, int)
    if number < 1:
        raise source.error(f"args.{key}", f"= {number} is not positive; copy the file again")
    return number


def _needed(source: ConfigSource, given: Mapping[str, Any], key: str, kind: type) -> Any:
    if given.get(key) is None:
        raise _missing(source, key)
    return read(kind, given[key], source, f"args.{key}")


def _optional(source: ConfigSource, given: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    return default if given.get(key) is None else read(kind, given[key], source, f"args.{key}")


def _missing(source: ConfigSource, key: str) -> UserError:
    return source.error(
        f"args.{key}", "is missing and has no default; load the checkpoint with a newer Megatron-LM, and save it again"
    )
