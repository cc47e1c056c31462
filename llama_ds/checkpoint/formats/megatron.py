"""Megatron-LM's checkpoints of a LLaMA, in its "torch" format with the names of Megatron core.

    latest_checkpointed_iteration.txt              "100", or "release" for weights without a training state
    iter_0000100/mp_rank_TT/model_optim_rng.pt     of tensor-parallel rank TT; release/ instead of iter_0000100/
    iter_0000100/mp_rank_TT_PPP/model_optim_rng.pt the same with pipeline stage PPP, if there are several

A file holds `args`, `checkpoint_version` and the state dict `model`. With a virtual pipeline it has several, `model0`,
`model1`, ...: the layers of all `model0` come first, in the order of the stages, then those of all `model1`. Each of
them counts its layers from 0. `megatron_args` reads the args, `fused` describes the fused matrices.

Sources: megatron/training/checkpointing.py, megatron/core/transformer/attention.py, mlp.py and
megatron/core/models/gpt of github.com/NVIDIA/Megatron-LM.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from llama_ds.checkpoint.formats.fused import Unfused
from llama_ds.checkpoint.formats.inventory import check_file, model_files, same
from llama_ds.checkpoint.formats.megatron_args import MegatronSettings, settings_of
from llama_ds.checkpoint.formats.meta_params import Unsaid
from llama_ds.checkpoint.formats.rank_parts import RankParts
from llama_ds.checkpoint.formats.views import RotaryReordered, TableRows
from llama_ds.checkpoint.stored import Stored, located, torch_content
from llama_ds.checkpoint.weights import ModelFiles, Readable
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError
from llama_ds.layout.weights import EMBEDDING_KEY, Key, weight_of, weight_shapes

TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
RANK_FILE = "model_optim_rng.pt"
RANK_FOLDER = re.compile(r"mp_rank_\d{2,}(_\d{3,})*")
VERSION = 3.0  # checkpoint_version; earlier ones order the rows of query, key and value differently
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
OTHER_FORMATS = (".metadata", "metadata.json", "common.pt")  # files of torch_dist and torch_dcp


@dataclass(frozen=True)
class Chunk(RankParts):
    """One chunk of the model's layers."""

    def layers(self) -> int:
        """Return the number of decoder layers.

        Raises:
            UserError: they are not numbered from 0 on.
        """
        found = {int(match[1]) for name in self.parts[0] if (match := LAYER.fullmatch(name))}
        if found != set(range(len(found))):
            raise UserError(f"{self.paths[0]}: its layers are not numbered 0, 1, 2, ...; copy the file again")
        return len(found)


def open_megatron(folder: str, vocab_size: int | None = None, unsaid: Unsaid | None = None) -> ModelFiles:
    """Return the weights of a Megatron-LM checkpoint.

    Args:
        folder: the folder that Megatron-LM loads from (its newest checkpoint), or one checkpoint in it.
        vocab_size: rows of the vocabulary tables; by default those of the tokenizer, without the padding.
        unsaid: what the args do not say.

    Raises:
        UserError: the args are not those of a LLaMA, a file or tensor is missing, unknown or misshapen, or `vocab_size`
            or `unsaid` is needed.
    """
    where = _checkpoint_in(folder)
    first = _first_file(where)
    settings = settings_of(first, _content(first).get("args"), vocab_size, unsaid or Unsaid())
    chunks = _chunks(where, settings, vocab_size, unsaid or Unsaid())
    names, tensors = _tensors(where, settings, chunks)
    files = model_files(folder, where, "args", names, settings.model, settings.seq_len, tensors, vocab_size)
    return replace(files, initializer_range=settings.initializer_range, notes=settings.notes)


def holds_megatron(folder: str) -> bool:
    """Return whether a folder looks like Megatron-LM's checkpoints, or one of them."""
    return TRACKER in (names := os.listdir(folder)) or any(RANK_FOLDER.fullmatch(name) for name in names)


def _checkpoint_in(folder: str) -> str:
    """Return the folder of the checkpoint that a folder names as its newest, or the folder itself."""
    tracker = os.path.join(folder, TRACKER)
    if not os.path.lexists(tracker):
        return folder
    with open(check_file(tracker), encoding="utf-8", errors="replace") as file:
        text = file.read(100).strip()
    if text != RELEASE and not re.fullmatch(r"\d{1,9}", text):
        raise UserError(f"{tracker}: holds {text!r}, neither an iteration nor {RELEASE}; correct it")
    name = RELEASE if text == RELEASE else f"iter_{int(text):07d}"
    where = os.path.join(folder, name)
    if not os.path.isdir(where):
        raise UserError(f"{tracker}: names {name}, which is not there; copy it again, or give one of the others")
    return where


def _first_file(where: str) -> str:
    names = [name for name in ("mp_rank_00", "mp_rank_00_000") if os.path.isdir(os.path.join(where, name))]
    if names:
        return check_file(os.path.join(where, names[0], RANK_FILE))
    if any(os.path.lexists(os.path.join(where, name)) for name in OTHER_FORMATS):
        raise UserError(
            f"{where}: is a distributed checkpoint of Megatron-LM (torch_dist or torch_dcp); save it in the format "
            "torch, with Megatron-LM's --ckpt-convert-format torch"
        )
    raise UserError(
        f"{where}: contains no mp_rank_00/{RANK_FILE}; copy the checkpoint again, with the files of all ranks"
    )


def _content(path: str) -> dict[str, Any]:
    content = torch_content(path, inert=True)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no dict of args and model; give a checkpoint that Megatron-LM saved")
    return content


def _chunks(where: str, settings: MegatronSettings, vocab_size: int | None, unsaid: Unsaid) -> list[Chunk]:
    """Return the chunks of all stages in the order of their layers, checked to be of one model."""
    _check_folders(where, settings)
    stages: list[list[Chunk]] = []
    for stage in range(settings.pp):
        paths = [
            check_file(os.path.join(where, rank_folder(rank, stage, settings.pp), RANK_FILE))
            for rank in range(settings.tp)
        ]
        contents = [_content(path) for path in paths]
        for path, content in zip(paths, contents, strict=True):
            if settings_of(path, content.get("args"), vocab_size, unsaid) != settings:
                raise UserError(f"{path}: its args differ from those of rank 0: files of two models; copy it again")
        parts = [_state_dicts(path, content) for path, content in zip(paths, contents, strict=True)]
        if len({len(chunks) for chunks in parts}) > 1:
            raise UserError(f"{paths[0]}: the ranks of this stage hold different numbers of chunks; copy them again")
        stages.append([Chunk(tuple(paths), chunk) for chunk in zip(*parts, strict=True)])
    if len({len(chunks) for chunks in stages}) > 1:
        raise UserError(f"{where}: its pipeline stages hold different numbers of chunks; copy it again")
    return [stage[index] for index in range(len(stages[0])) for stage in stages]


def _check_folders(where: str, settings: MegatronSettings) -> None:
    """Check that there is a folder for each rank, and no other."""
    found = {name for name in os.listdir(where) if RANK_FOLDER.fullmatch(name)}
    what = f"args say tensor_model_parallel_size = {settings.tp}, pipeline_model_parallel_size = {settings.pp}"
    wanted = set()
    for name in (rank_folder(rank, stage, settings.pp) for stage in range(settings.pp) for rank in range(settings.tp)):
        if name not in found:
            raise UserError(f"{where}: {name} is missing ({what}); copy the files of all ranks")
        wanted.add(name)
    if others := sorted(found - wanted):
        raise UserError(f"{where}: {others[0]} is of no rank of this checkpoint ({what}); move it away")


def rank_folder(rank: int, stage: int, pp: int) -> str:
    """Return the name of a rank's folder."""
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")


def _state_dicts(path: str, content: Mapping[str, Any]) -> list[Mapping[str, Stored]]:
    """Return the tensors of each chunk in a rank's file."""
    version = content.get("checkpoint_version")
    if not isinstance(version, int | float) or version < VERSION:
        raise UserError(
            f"{path}: checkpoint_version = {version!r}, this project reads {VERSION:g} and later; load the checkpoint "
            "with a newer Megatron-LM, and save it again"
        )
    keys = ["model"] if "model" in content else [f"model{i}" for i in range(len(content)) if f"model{i}" in content]
    if not keys:
        raise UserError(f"{path}: holds no state dict named model; give a checkpoint that Megatron-LM saved")
    return [_weights_in(path, content[key]) for key in keys]


def _weights_in(path: str, state: object) -> Mapping[str, Stored]:
    if not isinstance(state, dict):
        raise UserError(f"{path}: its model is no state dict; give a checkpoint that Megatron-LM saved")
    weights = {name: value for name, value in state.items() if not str(name).endswith(EXTRA_STATE)}
    other = next((name for name, value in weights.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise UserError(f"{path}: {other} is no plain tensor; save the weights in bf16, fp16 or fp32")
    return located(path, weights)


def _tensors(where: str, settings: MegatronSettings, chunks: list[Chunk]) -> tuple[dict[Key, str], dict[Key, Readable]]:
    """Return the names, for messages, and the tensors of a model."""
    model = settings.model
    _check_layers(where, model, chunks)
    _check_ranks(where, model, settings.tp)
    names: dict[Key, str] = {}
    tensors: dict[Key, Readable] = {}
    layer = 1
    for index, chunk in enumerate(chunks):
        ends = _end_names(settings, chunk, index == 0, index == len(chunks) - 1)
        layers = [_LayerOf(chunk, number, settings) for number in range(chunk.layers())]
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
        if not settings.model.tie_word_embeddings or HEAD in chunk.parts[0]:
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

    def __init__(self, chunk: Chunk, local: int, settings: MegatronSettings) -> None:
        self._chunk, self._prefix = chunk, f"decoder.layers.{local}."
        self._settings = settings

    def name_of(self, name: str) -> str:
        """Return the name of the tensor that holds weight `name`."""
        if name in NORMS:
            spellings = [self._prefix + spelling for spelling in NORMS[name].values()]
            return next((spelling for spelling in spellings if spelling in self._chunk.parts[0]), spellings[0])
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
        yield from self._unfused((Q, K, V), qkv_lengths(model))
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
