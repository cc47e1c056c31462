"""Reading and writing params.json of Meta's releases.

Sources: `ModelArgs` of github.com/meta-llama/llama (LLaMA 1 and 2, Code Llama), llama3 and llama-models. The first two
accept no keys but their own, so that what they do not know is not written. llama-models ignores other keys.

Two things that a model needs are not in the published files: the factor of the rotary scaling (Llama 3.1 and 3.2 differ
in it, Meta's code has the former's for both) and the longest sequence. They are recognised where a release is the only
one of its shape; otherwise `Unsaid` says them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from llama_ds.checkpoint.formats.hf_config import read_object
from llama_ds.checkpoint.formats.inventory import check_file, check_layers
from llama_ds.checkpoint.formats.plain_llama import check_plain
from llama_ds.config.reader import ConfigSource, check_keys, read
from llama_ds.config.schema import ModelConfig, RopeScaling
from llama_ds.errors import UserError

PARAMS = "params.json"
LLAMA3_THETA = 500_000.0  # rope_theta of Llama 3; earlier releases have a smaller one
THETA = 10_000.0  # rope_theta of LLaMA 1 and 2, whose code has no such key
SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)  # constants of use_scaled_rope in Meta's code
SCALING_KEYS = ("rope_scaling_factor", "rope_high_freq_factor")  # optional keys of Llama 4's ModelArgs
KEYS = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"),
    *("rope_theta", "use_scaled_rope", "max_seq_len", "max_batch_size", *SCALING_KEYS),
)
MULTIPLES = (256, 1024, 4096)  # values of multiple_of in the published models
# Factors of the published models with use_scaled_rope, by dim, n_layers, n_heads, n_kv_heads, width of the feed-forward
# layers and vocab_size: as in the config.json of the same models on Hugging Face.
FACTORS = {
    (4096, 32, 32, 8, 14336, 128256): 8.0,  # Llama 3.1 8B
    (8192, 80, 64, 8, 28672, 128256): 8.0,  # 3.1 and 3.3 70B
    (16384, 126, 128, 8, 53248, 128256): 8.0,  # 3.1 405B
    (16384, 126, 128, 16, 53248, 128256): 8.0,  # 3.1 405B on 16 ranks, with each key and value head twice
    (2048, 16, 32, 8, 8192, 128256): 32.0,  # 3.2 1B
    (3072, 28, 24, 8, 8192, 128256): 32.0,  # 3.2 3B
}
ONLY_LLAMA1 = ((6656, 60), (8192, 80))  # dim and layers of 30B and 65B, of the releases without n_kv_heads


@dataclass(frozen=True)
class Unsaid:
    """What the files of a format do not say; None: as far as it can be recognised."""

    rope_factor: float | None = None  # factor of the rotary scaling, where use_scaled_rope is true
    seq_len: int | None = None  # longest sequence that the model was trained for, in tokens
    qkv_order: str | None = None  # one of choices.QKV_ORDERS, for GPT-NeoX
    rope_theta: float | None = None  # for Megatron-LM before Megatron core, which ignores the rotary base of its args


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


def model_of(folder: str, params: Mapping[str, Any], vocab_size: int, tied: bool, unsaid: Unsaid) -> ModelConfig:
    """Return the model.

    Args:
        vocab_size: rows of the vocabulary tables, used if the file says -1.

    Raises:
        UserError: a number is missing or invalid, or the factor of the rotary scaling is not known.
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
        "rope_theta": read(float, params.get("rope_theta", THETA), source, "rope_theta"),
        "tie_word_embeddings": tied,
    }
    model = read(ModelConfig, shape, source)
    check_layers(path, model)
    return replace(model, rope_scaling=_scaling(source, params, model, unsaid)) if scaled else model


def seq_len_of(params: Mapping[str, Any], model: ModelConfig, unsaid: Unsaid) -> tuple[int, tuple[str, ...]]:
    """Return the longest sequence that the model was trained for, in tokens, and what to tell the user about it."""
    if unsaid.seq_len is not None:
        return unsaid.seq_len, ()
    if type(found := params.get("max_seq_len")) is int and found > 0:
        return found, ()
    length, release, others = _release_length(params, model)
    if not others:
        return length, ()
    note = (
        f"sequence length: {length} tokens assumed, as of {release}, because {PARAMS} does not say it ({others}); "
        "another by --seq-len N"
    )
    return length, (note,)


def _release_length(params: Mapping[str, Any], model: ModelConfig) -> tuple[int, str, str]:
    """Return the sequence length of a release, its name, and which others might be meant; "": none."""
    if model.rope_theta == LLAMA3_THETA:
        return (131_072, "Llama 3.1 and later", "") if model.rope_scaling else (8192, "Llama 3", "")
    if model.rope_theta == 1e6:
        return 16_384, "Code Llama", ""
    if model.rope_theta != THETA:
        return 2048, "LLaMA 1", f"no release has rope_theta {model.rope_theta:g}"
    if model.num_key_value_heads != model.num_attention_heads:
        known = (model.hidden_size, model.num_hidden_layers) == (8192, 80)  # 70B
        return 4096, "Llama 2", "" if known else "no release has this shape"
    if (model.hidden_size, model.num_hidden_layers) in ONLY_LLAMA1:
        return 2048, "LLaMA 1", ""
    if model.rms_norm_eps == 1e-5:  # LLaMA 1 7B and 13B have 1e-6
        return 4096, "Llama 2", "LLaMA 1 has 2048"
    return 2048, "LLaMA 1", "the first files of Llama 2 had the same norm_eps, and 4096 tokens"


def _scaling(source: ConfigSource, params: Mapping[str, Any], model: ModelConfig, unsaid: Unsaid) -> RopeScaling:
    factor: Any = params.get("rope_scaling_factor")
    if factor is not None and unsaid.rope_factor not in (None, factor):
        raise source.error("rope_scaling_factor", f"= {factor}, not {unsaid.rope_factor:g}; leave --rope-factor out")
    if factor is None:
        factor = unsaid.rope_factor or FACTORS.get(_shape(model))
    if factor is None:
        raise source.error(
            "use_scaled_rope",
            "= true, and the factor of the scaling is not in the file: Llama 3.1 and 3.3 have 8, Llama 3.2 has 32; "
            'convert with --rope-factor 8 or 32, or add "rope_scaling_factor": 8.0 or 32.0 to the file',
        )
    high = params.get("rope_high_freq_factor")
    given = asdict(SCALING) | {"factor": factor} | ({} if high is None else {"high_freq_factor": high})
    return read(RopeScaling, given, source, "rope_scaling")


def _shape(model: ModelConfig) -> tuple[int, int, int, int, int, int]:
    heads = model.num_attention_heads, model.num_key_value_heads
    return (model.hidden_size, model.num_hidden_layers, *heads, model.intermediate_size, model.vocab_size)


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
    # Meta's code computes with SCALING; Meta publishes Llama 3.2, which has another factor, in the same form.
    released = replace(SCALING, factor=FACTORS.get(_shape(model), SCALING.factor))
    if model.rope_scaling not in (None, SCALING, released):
        raise UserError(
            f"{source}: rope_scaling = {list(model.rope_scaling.parameters().values())}, Meta's code has "
            f"{list(SCALING.parameters().values())} built in; convert to hf or deepspeed"
        )
    grouped = model.num_key_value_heads
    return {
        "dim": model.hidden_size,
        "n_layers": model.num_hidden_layers,
        "n_heads": model.num_attention_heads,
        # The code of LLaMA 1 does not know n_kv_heads and rope_theta; without them it has the values left out here.
        **({} if grouped == model.num_attention_heads else {"n_kv_heads": grouped}),
        "vocab_size": model.vocab_size,
        **_inner_params(model, source),
        "norm_eps": model.rms_norm_eps,
        **({} if model.rope_theta == THETA else {"rope_theta": model.rope_theta}),
        **(_scaling_params(model.rope_scaling) if model.rope_scaling else {}),
    }


def _scaling_params(scaling: RopeScaling) -> dict[str, Any]:
    values = (scaling.factor, scaling.high_freq_factor)
    return {"use_scaled_rope": True, **dict(zip(SCALING_KEYS, values, strict=True))}


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
