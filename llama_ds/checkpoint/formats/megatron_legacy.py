"""Names and args of a LLaMA in Megatron-LM before Megatron core, and in Megatron-DeepSpeed, which began there.

The state dict is nested: `language_model` holds `embedding`, `encoder` (earlier `transformer`) and `output_layer`. A
head that is tied to an embedding on another stage is `word_embeddings_for_head`. Megatron-LM called its norms
`input_norm`, ... when it got RMSNorm, Megatron-DeepSpeed still calls them `input_layernorm`, ....

The rows of query, key and value depend on checkpoint_version: K is the size of the H heads of a rank.

    0 or none    its queries, its keys, its values: H K rows each
    1.0          row i of head h of query, of key and of value take turns
    2.0 and up   as in Megatron core: for each group its heads of queries, one of keys, one of values

Sources: megatron/model/transformer.py and language_model.py, `fix_query_key_value_ordering` in
megatron/checkpointing.py of github.com/NVIDIA/Megatron-LM (to 2023) and github.com/deepspeedai/Megatron-DeepSpeed.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, TypeVar

from llama_ds.checkpoint.formats.megatron_args import OLD_ROTARY_BASE
from llama_ds.checkpoint.formats.megatron_tensors import (
    EMBEDDING,
    FC1,
    FINAL_NORM,
    HEAD,
    NORMS,
    PARALLEL,
    QKV,
    qkv_lengths,
)
from llama_ds.checkpoint.formats.megatron_tensors import LAYER as CORE_LAYER
from llama_ds.checkpoint.formats.meta_params import Unsaid
from llama_ds.config.reader import ConfigSource
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError

T = TypeVar("T")

ROOT = "language_model"
LAYER = re.compile(r"language_model\.(?:encoder|transformer)\.layers\.(\d{1,6})\.(.*)")
TIED_HEAD = "word_embeddings_for_head.weight"
ENDS = {
    "language_model.embedding.word_embeddings.weight": EMBEDDING,
    "language_model.encoder.final_layernorm.weight": FINAL_NORM,
    "language_model.encoder.final_norm.weight": FINAL_NORM,
    "language_model.transformer.final_layernorm.weight": FINAL_NORM,
    "language_model.output_layer.weight": HEAD,
    TIED_HEAD: HEAD,
}
_BEFORE_ATTENTION, _BEFORE_MLP = (spellings["local"] for spellings in NORMS.values())
_OUTPUT, _DOWN = PARALLEL.values()
LOCAL = {
    "input_layernorm.weight": _BEFORE_ATTENTION,
    "input_norm.weight": _BEFORE_ATTENTION,
    "post_attention_layernorm.weight": _BEFORE_MLP,
    "post_attention_norm.weight": _BEFORE_MLP,
    "self_attention.query_key_value.weight": f"{QKV}.weight",
    "attention.query_key_value.weight": f"{QKV}.weight",
    "self_attention.dense.weight": f"{_OUTPUT}.weight",
    "attention.dense.weight": f"{_OUTPUT}.weight",
    "mlp.dense_h_to_4h.weight": f"{FC1}.weight",
    "mlp.dense_4h_to_h.weight": f"{_DOWN}.weight",
}


# The modules whose state dicts are nested in that of the model.
MODULES = (f"{ROOT}.embedding.word_embeddings", f"{ROOT}.encoder", f"{ROOT}.output_layer", "word_embeddings_for_head")


def legacy_name(name: str, norm: str, tied: bool = False) -> str:
    """Return the name of a weight in Megatron core (`local`) as it was before.

    Args:
        norm: what norms are called, "norm" or "layernorm".
        tied: the head is tied to the embedding.
    """
    ends = {
        EMBEDDING: f"{MODULES[0]}.weight",
        FINAL_NORM: f"{ROOT}.encoder.final_{norm}.weight",
        HEAD: TIED_HEAD if tied else f"{ROOT}.output_layer.weight",
    }
    layer = CORE_LAYER.fullmatch(name)
    return f"{ROOT}.encoder.layers.{layer[1]}.{legacy_local(layer[2], norm)}" if layer else ends[name]


def legacy_local(name: str, norm: str) -> str:
    """Return `legacy_name` within a decoder layer."""
    spelled = {
        _BEFORE_ATTENTION: f"input_{norm}.weight",
        _BEFORE_MLP: f"post_attention_{norm}.weight",
        f"{QKV}.weight": "self_attention.query_key_value.weight",
        f"{_OUTPUT}.weight": "self_attention.dense.weight",
        f"{FC1}.weight": "mlp.dense_h_to_4h.weight",
        f"{_DOWN}.weight": "mlp.dense_4h_to_h.weight",
    }
    return spelled[name]


def core_names(path: str, state: Mapping[str, T]) -> dict[str, T]:
    """Return a state dict with Megatron core's names; unknown names are kept.

    Raises:
        UserError: two tensors are spellings of one.
    """
    found: dict[str, T] = {}
    for name, value in state.items():
        layer = LAYER.fullmatch(name)
        new = ENDS.get(name, name)
        if layer and layer[2] in LOCAL:
            new = f"decoder.layers.{layer[1]}.{LOCAL[layer[2]]}"
        if new in found:
            raise UserError(f"{path}: tensor {name} is there in two spellings; copy the file again")
        found[new] = value
    return found


def modern_args(path: str, args: object, unsaid: Unsaid) -> object:
    """Return the args of file `path` with the arguments of Megatron core; what is no namespace is returned as it is.

    Raises:
        UserError: they have a rotary embedding that this model ignores, and `unsaid` does not say which counts.
    """
    if not isinstance(args, Namespace):
        return args
    given = dict(vars(args))
    norm = given.get("normalization") or "LayerNorm"  # earlier releases have no other
    rotary = given.get("use_rotary_position_embeddings")
    heads, groups = given.get("num_attention_heads"), given.get("num_key_value_heads")
    values = {
        "normalization": "RMSNorm" if str(norm).lower() == "rmsnorm" else norm,
        "norm_epsilon": given.get("layernorm_epsilon"),
        "position_embedding_type": "rope" if rotary is True else "learned_absolute",
        "swiglu": False,
        "add_bias_linear": not given.get("disable_bias_linear", False),
        "untie_embeddings_and_output_weights": False,
        "tensor_model_parallel_size": given.get("model_parallel_size"),
        "pipeline_model_parallel_size": 1,
    }
    if groups is not None:
        values |= {"group_query_attention": groups != heads, "num_query_groups": groups}
    replaced = {"normalization", "position_embedding_type"} if rotary is not None else {"normalization"}
    kept = {key: value for key, value in given.items() if value is not None and key not in replaced}
    experts = kept.get("num_experts")  # a list in Megatron-DeepSpeed
    if isinstance(experts, list) and set(experts) == {1}:
        kept["num_experts"] = None
    return Namespace(**{**values, **kept, **_rotary(ConfigSource(path), given, unsaid)})


def _rotary(source: ConfigSource, given: Mapping[str, Any], unsaid: Unsaid) -> dict[str, Any]:
    """Return base and scaling of the rotary embedding as arguments of Megatron core.

    Megatron-DeepSpeed computes with its argument rope_theta. Megatron-LM's model had none (2023-03 to 2026-05), and
    ignores those of Megatron core, which are in its args all the same: weights that it trained have base 10000 and no
    scaling, weights that were converted to its names have others.
    """
    theta, base = given.get("rope_theta"), given.get("rotary_base")
    computed = OLD_ROTARY_BASE if theta is None else theta
    ignored = base is not None and base != computed
    if unsaid.rope_theta is not None and not ignored:
        raise UserError(
            f"command line: --rope-theta does not apply to {source.path}: its args leave no choice; omit it"
        )
    if ignored and unsaid.rope_theta is None:
        raise source.error(
            "args.rotary_base",
            f"= {base} is ignored by the model with these names, which rotates with base {computed:g}; convert with "
            f"--rope-theta {computed:g} if it trained the weights, with --rope-theta {base} if they are those of "
            "another model",
        )
    found = {"rotary_base": unsaid.rope_theta if ignored else base if theta is None else theta}
    if not given.get("use_rope_scaling"):
        return found
    if unsaid.rope_factor is None:
        raise source.error(
            "args.use_rope_scaling",
            f"= {given['use_rope_scaling']} is ignored by the model with these names; convert with --rope-factor 1 "
            "(none) if it trained the weights, with the factor if they are those of another model",
        )
    return {**found, "use_rope_scaling": unsaid.rope_factor != 1, "rope_scaling_factor": unsaid.rope_factor}


def lengths_of(where: str, model: ModelConfig, tp: int, version: float) -> tuple[int, int, int]:
    """Return the rows of query, key and value that take turns in a checkpoint of this version.

    Raises:
        UserError: that version had no grouped heads.
    """
    if version >= 2:
        return qkv_lengths(model)
    if model.num_key_value_heads != model.num_attention_heads:
        raise UserError(
            f"{where}: checkpoint_version = {version:g} has no grouped heads, its args have; give the checkpoint as it "
            "was saved"
        )
    return (1, 1, 1) if version >= 1 else block_lengths(model, tp)


def block_lengths(model: ModelConfig, tp: int) -> tuple[int, int, int]:
    """Return the rows of all queries, keys and values of a tensor-parallel rank."""
    keys = model.num_key_value_heads // tp * model.head_dim
    return model.num_attention_heads // tp * model.head_dim, keys, keys
