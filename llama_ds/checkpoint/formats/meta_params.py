"""Reading and writing params.json of Meta's releases.

Source: `ModelArgs` of github.com/meta-llama/llama (LLaMA 1 and 2) and of llama3. It accepts no other keys, so the
sequence length is not written; on reading it is that of the release.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from llama_ds.checkpoint.formats.hf_config import read_object
from llama_ds.checkpoint.formats.inventory import check_file, check_layers
from llama_ds.checkpoint.formats.plain_llama import check_plain
from llama_ds.config.reader import ConfigSource, check_keys, read
from llama_ds.config.schema import ModelConfig, RopeScaling
from llama_ds.errors import UserError

PARAMS = "params.json"
LLAMA3_THETA = 500_000.0  # rope_theta of Llama 3; earlier releases have a smaller one
SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)  # constants of use_scaled_rope in Meta's code
KEYS = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"),
    *("rope_theta", "use_scaled_rope", "max_seq_len", "max_batch_size"),
)
MULTIPLES = (256, 1024, 4096)  # values of multiple_of in the published models


def inner_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Return the width F of the feed-forward layers (`FeedForward.__init__` with hidden_dim = 4 dim)."""
    inner = int(2 * 4 * dim / 3)
    if multiplier is not None:
        inner = int(multiplier * inner)
    return multiple_of * -(-inner // multiple_of)


def read_params(folder: str) -> dict[str, Any]:
    """Return the content of a folder's params.json.

    Raises:
        UserError: the file is missing or damaged, or holds an unknown key.
    """
    path = check_file(os.path.join(folder, PARAMS))
    params = read_object(path)
    check_keys(params, KEYS, ConfigSource(path))
    return params


def model_of(folder: str, params: Mapping[str, Any], vocab_size: int, tied: bool) -> tuple[ModelConfig, int]:
    """Return the model, and the longest sequence that its release was trained for.

    Args:
        vocab_size: rows of the vocabulary tables, used if the file says -1.

    Raises:
        UserError: a number is missing or invalid.
    """
    path = os.path.join(folder, PARAMS)
    source = ConfigSource(path)
    missing = [key for key in ("dim", "n_layers", "n_heads") if key not in params]
    if missing:
        raise source.error(missing[0], "is missing and has no default; copy the file again")
    sizes = {key: read(int, params[key], source, key) for key in ("dim", "n_layers", "n_heads")}
    dim, heads = sizes["dim"], sizes["n_heads"]
    if heads < 1 or dim % heads:
        raise source.error("n_heads", f"= {heads} does not divide dim = {dim}; copy the file again")
    vocabulary = read(int, params.get("vocab_size", -1), source, "vocab_size")
    multiple = read(int, params.get("multiple_of", 256), source, "multiple_of")
    if multiple < 1:
        raise source.error("multiple_of", f"= {multiple} is not positive; copy the file again")
    multiplier = params.get("ffn_dim_multiplier")
    scaled = read(bool, params.get("use_scaled_rope", False), source, "use_scaled_rope")
    shape = {
        "vocab_size": vocab_size if vocabulary == -1 else vocabulary,
        "hidden_size": dim,
        "intermediate_size": inner_size(
            dim, multiple, None if multiplier is None else read(float, multiplier, source, "ffn_dim_multiplier")
        ),
        "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads
        if params.get("n_kv_heads") is None
        else read(int, params["n_kv_heads"], source, "n_kv_heads"),
        "head_dim": dim // heads,
        "rms_norm_eps": read(float, params.get("norm_eps", 1e-5), source, "norm_eps"),
        "rope_theta": read(float, params.get("rope_theta", 10_000.0), source, "rope_theta"),
        "rope_scaling": asdict(SCALING) if scaled else None,
        "tie_word_embeddings": tied,
    }
    model = read(ModelConfig, shape, source)
    check_layers(path, model)
    llama3 = model.rope_theta >= LLAMA3_THETA
    return model, 131_072 if scaled else 8192 if llama3 else 2048


def params_of(model: ModelConfig, source: str) -> dict[str, Any]:
    """Return the content of params.json for a model; `source` is its path, for messages.

    Raises:
        UserError: Meta's code does not support the model's head size or rotary scaling.
    """
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        raise UserError(
            f"{source}: head_dim = {model.head_dim}, Meta's model has hidden_size {model.hidden_size} / "
            f"num_attention_heads {model.num_attention_heads}; convert to hf or deepspeed"
        )
    check_plain(model, source, "Meta's code")
    if model.rope_scaling not in (None, SCALING):
        raise UserError(
            f"{source}: rope_scaling = {list(model.rope_scaling.parameters().values())}, Meta's code has "
            f"{list(SCALING.parameters().values())} built in; convert to hf or deepspeed"
        )
    return {
        "dim": model.hidden_size,
        "n_layers": model.num_hidden_layers,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": model.num_key_value_heads,
        "vocab_size": model.vocab_size,
        **_inner_params(model, source),
        "norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        **({"use_scaled_rope": True} if model.rope_scaling else {}),
    }


def _inner_params(model: ModelConfig, source: str) -> dict[str, Any]:
    """Return multiple_of and, if needed, ffn_dim_multiplier for which Meta's formula gives F."""
    dim, inner = model.hidden_size, model.intermediate_size
    for multiplier in _multipliers(dim, inner):
        for multiple in (*MULTIPLES, *(1 << power for power in range(16, -1, -1))):
            if inner_size(dim, multiple, multiplier) == inner:
                return {"multiple_of": multiple} | ({} if multiplier is None else {"ffn_dim_multiplier": multiplier})
    raise UserError(f"{source}: no ffn_dim_multiplier makes intermediate_size = {inner}; convert to hf or deepspeed")


def _multipliers(dim: int, inner: int) -> Iterator[float | None]:
    """Yield the multipliers to try, those with the fewest digits first."""
    yield None
    ratio = inner / inner_size(dim, 1, None)
    for digits in range(1, 17):
        yield round(ratio, digits)
        yield round(ratio - 0.5 * 10**-digits, digits)
