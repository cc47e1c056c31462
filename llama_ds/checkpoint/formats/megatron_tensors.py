"""The tensors of a LLaMA in Megatron core's names, in the state dicts of its chunks.

Each chunk counts its layers from 0. `fused` describes the fused matrices. Messages give these names, also where the
files have the earlier ones of `megatron_legacy`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llama_ds.checkpoint.formats.fused import Unfused
from llama_ds.checkpoint.formats.inventory import same
from llama_ds.checkpoint.formats.megatron_args import MegatronSettings
from llama_ds.checkpoint.formats.rank_parts import RankParts
from llama_ds.checkpoint.formats.views import RotaryReordered, TableRows
from llama_ds.checkpoint.weights import Readable
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError
from llama_ds.layout.weights import EMBEDDING_KEY, Key, weight_of, weight_shapes

EMBEDDING, FINAL_NORM, HEAD = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)
QKV, FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
Q, K, V = (f"self_attn.{name}_proj.weight" for name in "qkv")
GATE, UP = "mlp.gate_proj.weight", "mlp.up_proj.weight"
PARALLEL = {"self_attn.o_proj.weight": "self_attention.linear_proj", "mlp.down_proj.weight": "mlp.linear_fc2"}
# The norms before a fused matrix: parts of its module in Transformer Engine, modules of their own otherwise.
NORMS = {
    "input_layernorm.weight": {"transformer_engine": f"{QKV}.layer_norm_weight", "local": "input_layernorm.weight"},
    "post_attention_layernorm.weight": {
        "transformer_engine": f"{FC1}.layer_norm_weight",
        "local": "pre_mlp_layernorm.weight",
    },
}
LAYER = re.compile(r"decoder\.layers\.(\d{1,6})\.(.*)")
EXTRA_STATE = "._extra_state"  # None, or the scales of FP8


@dataclass(frozen=True)
class Chunk(RankParts):
    """One chunk of the model's layers."""

    def layers(self) -> int:
        """Return the number of decoder layers.

        Raises:
            UserError: they are not numbered from 0 on.
        """
        found = {int(match[1]) for name in self.names if (match := LAYER.fullmatch(name))}
        if found != set(range(len(found))):
            raise UserError(f"{self.paths[0]}: its layers are not numbered 0, 1, 2, ...; copy the file again")
        return len(found)


def tensors_of(
    where: str, settings: MegatronSettings, chunks: list[Chunk], lengths: tuple[int, int, int]
) -> tuple[dict[Key, str], dict[Key, Readable]]:
    """Return the names, for messages, and the tensors of a model.

    Args:
        lengths: rows of query, key and value that take turns in their fused matrix.

    Raises:
        UserError: a tensor is missing, unknown or misshapen.
    """
    model = settings.model
    _check_layers(where, model, chunks)
    _check_ranks(where, model, settings.tp)
    names: dict[Key, str] = {}
    tensors: dict[Key, Readable] = {}
    layer = 1
    for index, chunk in enumerate(chunks):
        ends = _end_names(settings, chunk, index == 0, index == len(chunks) - 1)
        layers = [_LayerOf(chunk, number, settings, lengths) for number in range(chunk.layers())]
        chunk.check([*ends.values(), *(name for found in layers for name in found.names())])
        for found in layers:
            for local, tensor in found.tensors():
                tensors[layer, local], names[layer, local] = tensor, found.name_of(local)
            layer += 1
        for key, name in ends.items():
            cut = None if name == FINAL_NORM else 0
            shape = (model.hidden_size,) if cut is None else (settings.padded_vocab_size, model.hidden_size)
            whole = chunk.merged(name, cut, shape)
            tensors[key] = whole if cut is None else TableRows(whole, model.vocab_size)
            names[key] = name
    if model.tie_word_embeddings:
        _drop_tied_head(where, model, tensors)
    return names, {key: tensors[key] for key in weight_shapes(model)}


def _check_layers(where: str, model: ModelConfig, chunks: list[Chunk]) -> None:
    found = sum(chunk.layers() for chunk in chunks)
    if found != model.num_hidden_layers:
        raise UserError(
            f"{where}: its files hold {found} layers, args.num_layers = {model.num_hidden_layers}; copy it again"
        )


def _check_ranks(where: str, model: ModelConfig, tp: int) -> None:
    sizes = {"ffn_hidden_size": model.intermediate_size, "num_attention_heads": model.num_attention_heads}
    for key, size in sizes.items():
        if size % tp:
            raise UserError(f"{where}: args.{key} = {size} is not divisible by the {tp} ranks; copy it again")


def _end_names(settings: MegatronSettings, chunk: Chunk, first: bool, last: bool) -> dict[Key, str]:
    """Return the names of the weights outside of decoder layers that a chunk holds."""
    layers = settings.model.num_hidden_layers
    names: dict[Key, str] = {EMBEDDING_KEY: EMBEDDING} if first else {}
    if last:
        names[layers + 1, "norm.weight"] = FINAL_NORM
        # A tied head exists where the embedding is on another stage.
        if not settings.model.tie_word_embeddings or HEAD in chunk.names:
            names[layers + 2, "lm_head.weight"] = HEAD
    return names


def _drop_tied_head(where: str, model: ModelConfig, tensors: dict[Key, Readable]) -> None:
    head = tensors.pop((model.num_hidden_layers + 2, "lm_head.weight"), None)
    if head is not None and not same(tensors[EMBEDDING_KEY], head):
        raise UserError(
            f"{where}: args.untie_embeddings_and_output_weights = False, but {HEAD} differs from {EMBEDDING}; "
            "the files belong to two checkpoints: copy it again"
        )


class _LayerOf:
    """A decoder layer of a chunk."""

    def __init__(self, chunk: Chunk, local: int, settings: MegatronSettings, lengths: tuple[int, int, int]) -> None:
        self._chunk, self._prefix = chunk, f"decoder.layers.{local}."
        self._settings, self._lengths = settings, lengths

    def name_of(self, name: str) -> str:
        """Return the name of the tensor that holds weight `name`."""
        if name in NORMS:
            spellings = [self._prefix + spelling for spelling in NORMS[name].values()]
            return next((spelling for spelling in spellings if spelling in self._chunk.names), spellings[0])
        module = QKV if name in (Q, K, V) else FC1 if name in (GATE, UP) else PARALLEL[name]
        return f"{self._prefix}{module}.weight"

    def names(self) -> list[str]:
        """Return the names of the layer's tensors."""
        return list(dict.fromkeys(map(self.name_of, (*NORMS, Q, GATE, *PARALLEL))))

    def tensors(self) -> Iterator[tuple[str, Readable]]:
        """Yield the layer's weights by local name."""
        model, tp = self._settings.model, self._settings.tp
        for name in NORMS:
            yield name, self._chunk.merged(self.name_of(name), None, (model.hidden_size,))
        for name in PARALLEL:
            yield name, self._chunk.merged(self.name_of(name), 1, weight_of(name).shape(model))
        yield from self._unfused((Q, K, V), self._lengths)
        yield from self._unfused((GATE, UP), gate_up_lengths(model, tp))

    def _unfused(self, names: tuple[str, ...], lengths: tuple[int, ...]) -> Iterator[tuple[str, Readable]]:
        model = self._settings.model
        rows = sum(weight_of(name).shape(model)[0] for name in names)
        fused = self._chunk.merged(self.name_of(names[0]), 0, (rows, model.hidden_size))
        for index, name in enumerate(names):
            tensor: Readable = Unfused(fused, lengths, index)
            if self._settings.interleaved and name in (Q, K):
                tensor = RotaryReordered(tensor, model.head_dim, to_halves=True)
            yield name, tensor


def qkv_lengths(model: ModelConfig) -> tuple[int, int, int]:
    """Return the rows of queries, keys and values in each group."""
    return model.num_attention_heads // model.num_key_value_heads * model.head_dim, model.head_dim, model.head_dim


def gate_up_lengths(model: ModelConfig, tp: int) -> tuple[int, int]:
    """Return the rows of gate and up on each tensor-parallel rank."""
    return model.intermediate_size // tp, model.intermediate_size // tp
