"""Keys of config.json that LlamaConfig does not know, or that this project does not read.

transformers' LlamaForCausalLM ignores a key that it does not know. Code that came with the weights need not: the keys
here are those by which relatives of LLaMA compute something else. Their weights have LLaMA's names and shapes, so that
nothing else would tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_ds.errors import UserError

ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM")  # the latter in conversions before transformers 4.28
# Values with which a key changes nothing. A key that is absent or null changes nothing either.
NEUTRAL: dict[str, tuple[object, ...]] = {
    # Granite, MiniCPM, Cohere, Grok: factors on embeddings, attention scores, residuals and logits
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "attn_scale", "scale_attn"), ()),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (1,)),
    **dict.fromkeys(("scale_emb", "input_scale", "output_multiplier_scale", "embedding_multiplier_scale"), (1,)),
    **dict.fromkeys(("scale_depth", "dim_model_base"), ()),
    # Gemma, DBRX, OLMo, Command: limits of scores, logits or projections
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "qkv_clip", "clip_attn"), ()),
    # Qwen3, Llama 4, Cohere: norms of queries and keys
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "use_qkv_norm"), (False,)),
    # positions
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval", "nope_layer_interval", "alibi"), (False, 0, [])),
    **dict.fromkeys(("rope_interleaved", "rope_interleave", "use_alibi", "use_dynamic_ntk"), (False,)),
    **dict.fromkeys(("rotary_pct", "rotary_percent"), (1,)),
    # which tokens attention sees
    **dict.fromkeys(("attention_chunk_size", "attn_temperature_tuning"), (False, 0)),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention"), (False,)),
    **dict.fromkeys(("is_causal", "use_causal_mask"), (True,)),
    # experts, and other layers
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), (0, 1)),
    **dict.fromkeys(("use_parallel_residual", "parallel_attn", "parallel_residual"), (False,)),
    **dict.fromkeys(("num_nextn_predict_layers", "cross_attention_layers"), (0, [])),
}
FULL_ATTENTION = "full_attention"  # the only kind in `layer_types` that sees all earlier tokens
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_settings(path: str, config: Mapping[str, Any]) -> None:
    """Check that no key of config.json makes the model compute something else than a LLaMA.

    Raises:
        UserError: one does, or a token id is no id; the message names it.
    """
    names = config.get("architectures") or []
    if config.get("model_type") == "llama" and (not isinstance(names, list) or set(names) - set(ARCHITECTURES)):
        raise UserError(
            f"{path}: architectures = {json.dumps(names)}, this project reads {ARCHITECTURES[0]}; give the causal "
            "language model itself"
        )
    for key, neutral in NEUTRAL.items():
        value = config.get(key)
        if value is not None and value not in neutral:
            raise UserError(
                f"{path}: {key} = {json.dumps(value)} makes a model that is not a plain LLaMA, and this project would "
                "ignore it; give a model of that architecture, or remove the key if its code ignores it, too"
            )
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != FULL_ATTENTION for kind in kinds)):
        raise UserError(
            f"{path}: layer_types = {json.dumps(kinds)}, in this project all layers have {FULL_ATTENTION}; "
            "give a model of that architecture"
        )
    for key in TOKEN_IDS:
        _check_ids(path, key, config.get(key))


def _check_ids(path: str, key: str, value: object) -> None:
    ids = value if isinstance(value, list) and value and key == "eos_token_id" else [value]
    if value is not None and not all(type(index) is int for index in ids):
        wanted = "an integer, or a list of them" if key == "eos_token_id" else "an integer"
        raise UserError(f"{path}: {key} = {json.dumps(value)} is not {wanted}; correct it there")
