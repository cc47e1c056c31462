"""Megatron-LM's checkpoints of a LLaMA, in its "torch" format, with the names of Megatron core or earlier ones.

    latest_checkpointed_iteration.txt              "100", or "release" for weights without a training state
    iter_0000100/mp_rank_TT/model_optim_rng.pt     of tensor-parallel rank TT; release/ instead of iter_0000100/
    iter_0000100/mp_rank_TT_PPP/model_optim_rng.pt the same with pipeline stage PPP, if there are several

A file holds `args`, `checkpoint_version` and the state dict `model`. With a virtual pipeline it has several, `model0`,
`model1`, ...: the layers of all `model0` come first, in the order of the stages, then those of all `model1`. Each of
them counts its layers from 0. `megatron_args` reads the args, `megatron_tensors` finds the tensors, `megatron_legacy`
knows the names before Megatron core, and `megatron_deepspeed` the folders that DeepSpeed's engine writes.

Sources: megatron/training/checkpointing.py, megatron/core/transformer/attention.py, mlp.py and
megatron/core/models/gpt of github.com/NVIDIA/Megatron-LM.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from llama_ds.checkpoint.formats.dcp import METADATA, OTHER_FORMAT
from llama_ds.checkpoint.formats.engine_files import RANK_FILE as RANK_FILE_OF_ENGINE
from llama_ds.checkpoint.formats.engine_files import foreign_names
from llama_ds.checkpoint.formats.inventory import check_file, model_files
from llama_ds.checkpoint.formats.megatron_args import MegatronSettings, settings_of
from llama_ds.checkpoint.formats.megatron_deepspeed import (
    MegatronSource,
    holds_megatron_deepspeed,
    read_megatron_deepspeed,
)
from llama_ds.checkpoint.formats.megatron_dist import is_distributed, open_distributed
from llama_ds.checkpoint.formats.megatron_legacy import ROOT, block_lengths, core_names, lengths_of, modern_args
from llama_ds.checkpoint.formats.megatron_tensors import EXTRA_STATE, Chunk, qkv_lengths, tensors_of
from llama_ds.checkpoint.formats.meta_params import Unsaid
from llama_ds.checkpoint.stored import Stored, flat, located, torch_content
from llama_ds.checkpoint.weights import ModelFiles
from llama_ds.errors import UserError

TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
RANK_FILE = "model_optim_rng.pt"
RANK_FOLDER = re.compile(r"mp_rank_\d{2,}(_\d{3,})*")
VERSION = 3.0  # checkpoint_version; earlier ones order the rows of query, key and value differently


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
    unsaid = unsaid or Unsaid()
    engine, names = foreign_names(folder)
    if any(RANK_FILE_OF_ENGINE.fullmatch(name) for name in names):
        found = read_megatron_deepspeed(engine, vocab_size, unsaid)
    else:
        found = _read(_checkpoint_in(folder), vocab_size, unsaid)
    settings = found.settings
    spelled, tensors = tensors_of(found.where, settings, found.chunks, found.lengths)
    files = model_files(folder, found.where, "args", spelled, settings.model, settings.seq_len, tensors, vocab_size)
    return replace(files, initializer_range=settings.initializer_range, notes=settings.notes)


def holds_megatron(folder: str) -> bool:
    """Return whether a folder looks like checkpoints of Megatron-LM or Megatron-DeepSpeed, or one of them."""
    names = os.listdir(folder)
    if TRACKER in names or any(RANK_FOLDER.fullmatch(name) for name in names):
        return True
    if METADATA in names and any(name in names for name in OTHER_FORMAT):
        return True
    return holds_megatron_deepspeed(folder)


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
    raise UserError(
        f"{where}: contains no mp_rank_00/{RANK_FILE}; copy the checkpoint again, with the files of all ranks"
    )


def _content(path: str) -> dict[str, Any]:
    content = torch_content(path, inert=True)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no dict of args and model; give a checkpoint that Megatron-LM saved")
    return content


def _read(where: str, vocab_size: int | None, unsaid: Unsaid) -> MegatronSource:
    """Return the checkpoint in a folder, with the chunks of all stages in the order of their layers."""
    if is_distributed(where):
        return _read_distributed(where, vocab_size, unsaid)
    first = _first_file(where)
    content = _content(first)
    legacy = any(isinstance(state, dict) and ROOT in state for state in _models(content))
    if not legacy:
        _check_unsaid(where, unsaid)
    rank = _RankReader(vocab_size, unsaid, legacy)
    settings, version = rank.settings(first, content), rank.version(first, content)
    _check_folders(where, settings)
    stages: list[list[Chunk]] = []
    for stage in range(settings.pp):
        paths = [
            check_file(os.path.join(where, rank_folder(number, stage, settings.pp), RANK_FILE))
            for number in range(settings.tp)
        ]
        parts = []
        for path in paths:
            own = content if path == first else _content(path)
            if rank.settings(path, own) != settings or rank.version(path, own) != version:
                raise UserError(f"{path}: its args differ from those of rank 0: files of two models; copy it again")
            parts.append(rank.state_dicts(path, own))
        if len({len(chunks) for chunks in parts}) > 1:
            raise UserError(f"{paths[0]}: the ranks of this stage hold different numbers of chunks; copy them again")
        stages.append([Chunk(tuple(paths), chunk) for chunk in zip(*parts, strict=True)])
    if len({len(chunks) for chunks in stages}) > 1:
        raise UserError(f"{where}: its pipeline stages hold different numbers of chunks; copy it again")
    chunks = [stage[index] for index in range(len(stages[0])) for stage in stages]
    return MegatronSource(where, settings, chunks, _lengths(where, settings, version, unsaid))


def _check_unsaid(where: str, unsaid: Unsaid) -> None:
    """Refuse what only checkpoints before Megatron core leave open."""
    for flag, value in {"--qkv-order": unsaid.qkv_order, "--rope-theta": unsaid.rope_theta}.items():
        if value is not None:
            raise UserError(f"command line: {flag} does not apply to {where}: Megatron core has one, known; omit it")


def _read_distributed(where: str, vocab_size: int | None, unsaid: Unsaid) -> MegatronSource:
    """Return a checkpoint in the format torch_dist; its one chunk is the whole model of one rank."""
    if others := sorted(name for name in os.listdir(where) if RANK_FOLDER.fullmatch(name)):
        raise UserError(
            f"{where}: holds {others[0]} and a distributed checkpoint; move away the one that does not count"
        )
    _check_unsaid(where, unsaid)
    shared, chunk = open_distributed(where)
    rank = _RankReader(vocab_size, unsaid, legacy=False)
    settings = replace(rank.settings(where, shared), tp=1, pp=1)
    rank.version(where, shared)
    return MegatronSource(where, settings, [chunk], qkv_lengths(settings.model))


def _lengths(where: str, settings: MegatronSettings, version: float, unsaid: Unsaid) -> tuple[int, int, int]:
    if unsaid.qkv_order == "blocks":
        return block_lengths(settings.model, settings.tp)
    return lengths_of(where, settings.model, settings.tp, 2 if unsaid.qkv_order else version)


@dataclass(frozen=True)
class _RankReader:
    """Reads what a rank's file holds."""

    vocab_size: int | None
    unsaid: Unsaid
    legacy: bool  # True: with the names before Megatron core

    def settings(self, path: str, content: Mapping[str, Any]) -> MegatronSettings:
        """Return what the args say."""
        args = content.get("args")
        if self.legacy:
            args = modern_args(path, args, self.unsaid)
        return settings_of(path, args, self.vocab_size, self.unsaid)

    def version(self, path: str, content: Mapping[str, Any]) -> float:
        """Return the checkpoint_version.

        Raises:
            UserError: it is too early for Megatron core's names.
        """
        version = content.get("checkpoint_version")
        if self.legacy and version is None:
            return 0.0
        if not isinstance(version, int | float) or (version < VERSION and not self.legacy):
            raise UserError(
                f"{path}: checkpoint_version = {version!r}, this project reads {VERSION:g} and later with these names; "
                "load the checkpoint with a newer Megatron-LM, and save it again"
            )
        return float(version)

    def state_dicts(self, path: str, content: Mapping[str, Any]) -> list[Mapping[str, Stored]]:
        """Return the tensors of each chunk.

        Raises:
            UserError: there is none, or it holds something else than tensors.
        """
        models = _models(content)
        if not models:
            raise UserError(f"{path}: holds no state dict named model; give a checkpoint that Megatron-LM saved")
        if not self.legacy:
            return [_weights_in(path, state) for state in models]
        return [core_names(path, _weights_in(path, flat(state))) for state in models]


def _models(content: Mapping[str, Any]) -> list[Any]:
    keys = ["model"] if "model" in content else [f"model{i}" for i in range(len(content)) if f"model{i}" in content]
    return [content[key] for key in keys]


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


def _weights_in(path: str, state: object) -> Mapping[str, Stored]:
    if not isinstance(state, dict):
        raise UserError(f"{path}: its model is no state dict; give a checkpoint that Megatron-LM saved")
    weights = {name: value for name, value in state.items() if not str(name).endswith(EXTRA_STATE)}
    other = next((name for name, value in weights.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise UserError(f"{path}: {other} is no plain tensor; save the weights in bf16, fp16 or fp32")
    return located(path, weights)
