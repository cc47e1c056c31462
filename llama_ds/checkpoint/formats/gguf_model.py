"""GGUF, the format of llama.cpp, for its architecture `llama`: names, metadata and the plan of a conversion.

Two things differ from Hugging Face's layout: rows of query and key heads are ordered in adjacent rotary pairs, as in
Meta's format, and Llama 3's rotary scaling is a tensor of factors by which the frequencies are divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, replace
from typing import Any

import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_TENSOR,
    TENSOR_NAMES,
    GGUFValueType,
    Keys,
    LlamaFileType,
    TokenType,
)

from llama_ds.checkpoint.choices import SHARDED
from llama_ds.checkpoint.formats.gguf_blocks import BLOCK, Q8_0, Blocks, BlocksInFile, Rounded
from llama_ds.checkpoint.formats.gguf_file import ARCHITECTURE, Entry, GgufFile, InMemory
from llama_ds.checkpoint.formats.plan import Encoding, Numbers, OutputTensor, Plan, Target
from llama_ds.checkpoint.formats.views import ROTATED, RotaryReordered
from llama_ds.checkpoint.weights import DTYPES, ModelFiles, Readable
from llama_ds.config.schema import ModelConfig, RopeScaling
from llama_ds.config.section_rules import ROPE_KEYS
from llama_ds.errors import UserError
from llama_ds.layout.weights import Key
from llama_ds.model.rope import inverse_frequencies

LOCAL = {
    "input_layernorm.weight": MODEL_TENSOR.ATTN_NORM,
    "self_attn.q_proj.weight": MODEL_TENSOR.ATTN_Q,
    "self_attn.k_proj.weight": MODEL_TENSOR.ATTN_K,
    "self_attn.v_proj.weight": MODEL_TENSOR.ATTN_V,
    "self_attn.o_proj.weight": MODEL_TENSOR.ATTN_OUT,
    "post_attention_layernorm.weight": MODEL_TENSOR.FFN_NORM,
    "mlp.gate_proj.weight": MODEL_TENSOR.FFN_GATE,
    "mlp.down_proj.weight": MODEL_TENSOR.FFN_DOWN,
    "mlp.up_proj.weight": MODEL_TENSOR.FFN_UP,
    "weight": MODEL_TENSOR.TOKEN_EMBD,
    "norm.weight": MODEL_TENSOR.OUTPUT_NORM,
    "lm_head.weight": MODEL_TENSOR.OUTPUT,
}
ROPE_FACTORS = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"
FILE_TYPES = {
    "fp32": LlamaFileType.ALL_F32,
    "fp16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
# Fields of the model that metadata, names or shapes of tensors express.
EXPRESSED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings"),
)
# Fields of the rotary scaling that the factors express, which are Llama 3's.
SCALING = ("factor", *ROPE_KEYS["llama3"][0])
NO_SCORE = -10_000.0  # score of an id that no text has


@dataclass(frozen=True)
class GgufVocabulary:
    """A tokenizer as llama.cpp reads it."""

    model: str  # "llama": sentencepiece; "gpt2": byte-level BPE
    pre: str  # llama.cpp's name of what splits a text before the merges
    tokens: tuple[str, ...]  # by id
    types: tuple[int, ...]  # gguf.TokenType of each
    bos: int | None
    eos: int | None
    add_bos: bool  # documents begin with bos
    scores: tuple[float, ...] = ()  # sentencepiece only
    merges: tuple[str, ...] = ()  # byte-level BPE only
    unknown: int | None = None
    add_space_prefix: bool = False
    chat_template: str | None = None


def gguf_name(layer: int, name: str) -> str:
    """Return the name of weight `name` of layer `layer` in a GGUF file."""
    return TENSOR_NAMES[LOCAL[name]].format(bid=layer - 1) + ".weight"


def plan_gguf(files: ModelFiles, target: Target, file: str, vocabulary: GgufVocabulary | None) -> Plan:
    """Return the plan: one file of the name `file`. `vocabulary` None: it holds no tokenizer.

    Raises:
        UserError: llama.cpp's architecture `llama` does not compute this model, the target is sharded, or the tokenizer
            has more ids than the model.
    """
    if (target.tp, target.pp) != (1, 1):
        raise UserError(f"command line: --tp and --pp apply only to {SHARDED}; leave them out for gguf")
    _check_expressed(files)
    metadata = {
        **_general(file.removesuffix(".gguf"), target.dtype),
        **_shape(files.model, files.seq_len),
        **_tokenizer(files, vocabulary),
    }
    dtype = DTYPES.get(target.dtype, torch.float32)
    output = GgufFile(file, tuple(_tensors(files, target.dtype)), metadata=metadata)
    return Plan("gguf", dtype, (output,), {}, single=True)


def read_back_gguf(files: ModelFiles, plan: Plan, folder: str, dtype: str) -> ModelFiles:
    """Return the written model, read by gguf's reader, in this project's layout; `files` is the source.

    Raises:
        UserError: metadata or tensors are not those that were written.
    """
    (output,) = plan.files
    assert isinstance(output, GgufFile)
    found = output.read_back(folder)
    scaling = found.pop(ROPE_FACTORS, None)
    if scaling is not None and not torch.equal(scaling.whole(), _rope_factors(files.model)):
        raise UserError(f"{folder}: {ROPE_FACTORS} does not read back as it was written; convert again")
    tensors: dict[Key, Readable] = {}
    for layer, name in files.tensors:
        tensor = found[gguf_name(layer, name)]
        if name in ROTATED:
            tensor = RotaryReordered(tensor, files.model.head_dim, to_halves=True)
        tensors[layer, name] = tensor
    return replace(files, path=folder, dtype=dtype, tensors=tensors)


def rounded_as(source: Readable, result: Readable) -> Readable:
    """Return the source's values as the tensor of a written file holds them, but for its dtype."""
    stored = result.source if isinstance(result, RotaryReordered) else result
    return Rounded(source) if isinstance(stored, BlocksInFile) else source


def unquantized(files: ModelFiles) -> list[str]:
    """Return the matrices that q8_0 cannot hold, because their rows are no whole blocks; they become fp16."""
    return [gguf_name(*key) for key, t in files.tensors.items() if len(t.shape) > 1 and t.shape[1] % BLOCK]


def _check_expressed(files: ModelFiles) -> None:
    """Refuse a model of which this file's tables do not know every property."""
    scaling = files.model.rope_scaling
    unknown: list[tuple[Any, Field[Any]]] = [
        (files.model, known) for known in fields(ModelConfig) if known.name not in EXPRESSED
    ]
    unknown += [(scaling, known) for known in fields(RopeScaling) if scaling and known.name not in SCALING]
    for section, known in unknown:
        if (value := getattr(section, known.name)) != known.default:
            raise UserError(
                f"{files.path}: {known.name} = {value} cannot be written as GGUF by this tool; convert to hf, and that "
                "with llama.cpp's convert_hf_to_gguf.py"
            )


def _tensors(files: ModelFiles, dtype: str) -> Iterator[OutputTensor]:
    for (layer, name), tensor in files.tensors.items():
        source = RotaryReordered(tensor, files.model.head_dim, to_halves=False) if name in ROTATED else tensor
        yield OutputTensor(gguf_name(layer, name), tensor.shape, source, encoding=_encoding(tensor.shape, dtype))
    if files.model.rope_scaling:
        factors = InMemory(_rope_factors(files.model))
        yield OutputTensor(ROPE_FACTORS, factors.shape, factors, encoding=Numbers(torch.float32))


def _encoding(shape: tuple[int, ...], dtype: str) -> Encoding:
    """Return how a tensor is stored: norms in fp32, as llama.cpp requires, matrices as the user says."""
    if len(shape) == 1:
        return Numbers(torch.float32)
    if dtype == Q8_0:
        return Numbers(torch.float16) if shape[1] % BLOCK else Blocks()
    return Numbers(DTYPES[dtype])


def _rope_factors(model: ModelConfig) -> torch.Tensor:
    """Return the factors (K / 2) in fp32 by which llama.cpp divides the frequencies."""
    plain = inverse_frequencies(model.head_dim, model.rope_theta, None)
    return plain / inverse_frequencies(model.head_dim, model.rope_theta, model.rope_scaling)


def _general(name: str, dtype: str) -> dict[str, Entry]:
    quantized = {Keys.General.QUANTIZATION_VERSION: _integer(GGML_QUANT_VERSION)} if dtype == Q8_0 else {}
    return {
        Keys.General.TYPE: _text("model"),
        **({Keys.General.NAME: _text(name)} if name else {}),
        Keys.General.FILE_TYPE: _integer(int(FILE_TYPES[dtype])),
        **quantized,
    }


def _shape(model: ModelConfig, seq_len: int) -> dict[str, Entry]:
    found = {
        Keys.LLM.VOCAB_SIZE: _integer(model.vocab_size),
        Keys.LLM.CONTEXT_LENGTH: _integer(seq_len),
        Keys.LLM.EMBEDDING_LENGTH: _integer(model.hidden_size),
        Keys.LLM.BLOCK_COUNT: _integer(model.num_hidden_layers),
        Keys.LLM.FEED_FORWARD_LENGTH: _integer(model.intermediate_size),
        Keys.Attention.HEAD_COUNT: _integer(model.num_attention_heads),
        Keys.Attention.HEAD_COUNT_KV: _integer(model.num_key_value_heads),
        Keys.Attention.KEY_LENGTH: _integer(model.head_dim),
        Keys.Attention.VALUE_LENGTH: _integer(model.head_dim),
        Keys.Attention.LAYERNORM_RMS_EPS: _number(model.rms_norm_eps),
        Keys.Rope.DIMENSION_COUNT: _integer(model.head_dim),
        Keys.Rope.FREQ_BASE: _number(model.rope_theta),
    }
    return {key.format(arch=ARCHITECTURE): entry for key, entry in found.items()}


def _tokenizer(files: ModelFiles, vocabulary: GgufVocabulary | None) -> dict[str, Entry]:
    if vocabulary is None:
        return {Keys.Tokenizer.MODEL: _text("none")}
    full = _padded(files, vocabulary)
    found: dict[str, Entry | None] = {
        Keys.Tokenizer.MODEL: _text(full.model),
        Keys.Tokenizer.PRE: _text(full.pre),
        Keys.Tokenizer.LIST: _array(full.tokens),
        Keys.Tokenizer.SCORES: _array(full.scores),
        Keys.Tokenizer.TOKEN_TYPE: _array(full.types),
        Keys.Tokenizer.MERGES: _array(full.merges),
        Keys.Tokenizer.BOS_ID: _id(full.bos),
        Keys.Tokenizer.EOS_ID: _id(full.eos),
        Keys.Tokenizer.UNK_ID: _id(full.unknown),
        Keys.Tokenizer.ADD_BOS: _flag(full.add_bos),
        Keys.Tokenizer.ADD_EOS: _flag(False),
        Keys.Tokenizer.ADD_PREFIX: _flag(full.add_space_prefix),
        Keys.Tokenizer.CHAT_TEMPLATE: _text(full.chat_template) if full.chat_template else None,
    }
    return {key: entry for key, entry in found.items() if entry is not None}


def _padded(files: ModelFiles, vocabulary: GgufVocabulary) -> GgufVocabulary:
    """Return the vocabulary with a token for every row of the tables, because llama.cpp counts rows by tokens."""
    count, rows = len(vocabulary.tokens), files.model.vocab_size
    if count > rows:
        raise UserError(
            f"{files.path}: its tokenizer has {count} ids, its tables have {rows} rows; convert with --vocab-size "
            f"{count}, or with the tokenizer of the model"
        )
    known = set(vocabulary.tokens)
    names = (f"[PAD{i}]" for i in range(count, rows))
    return replace(
        vocabulary,
        tokens=(*vocabulary.tokens, *(f"[{name}]" if name in known else name for name in names)),
        types=(*vocabulary.types, *[int(TokenType.UNUSED)] * (rows - count)),
        scores=(*vocabulary.scores, *[NO_SCORE] * (rows - count)) if vocabulary.scores else (),
    )


def _text(value: str) -> Entry:
    return Entry(value, GGUFValueType.STRING)


def _number(value: float) -> Entry:
    return Entry(float(value), GGUFValueType.FLOAT32)


def _flag(value: bool) -> Entry:
    return Entry(value, GGUFValueType.BOOL)


def _integer(value: int) -> Entry:
    return Entry(value, GGUFValueType.UINT32)


def _id(value: int | None) -> Entry | None:
    return None if value is None else _integer(value)


def _array(values: tuple[object, ...]) -> Entry | None:
    return Entry(list(values), GGUFValueType.ARRAY) if values else None
