"""Checkpoints that other programs save with DeepSpeed's engines, without ZeRO-3: their folders and state dicts.

    latest                                        "global_step1000": the newest checkpoint
    global_step1000/mp_rank_MM_model_states.pt    state of the engine; the weights, too, if there is no pipeline
    global_step1000/layer_LL-model_TT-model_states.pt    weights of layer LL on tensor-parallel rank TT of a pipeline

A layer of DeepSpeed's PipelineModule has a file if it has a state dict; the functions between the layers have numbers
but no files. Source: deepspeed/runtime/engine.py and pipe/module.py.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama_ds.checkpoint.formats.inventory import check_file
from llama_ds.checkpoint.formats.rank_parts import RankParts
from llama_ds.checkpoint.manifest import DESCRIPTION
from llama_ds.checkpoint.store import LATEST
from llama_ds.checkpoint.stored import Stored, flat, located, torch_content, torch_tensors
from llama_ds.errors import UserError

LAYER_FILE = re.compile(r"layer_(\d{2,})-model_(\d{2,})-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_(\d{2,})_model_states\.pt")


def layer_file(layer: int, tp_rank: int) -> str:
    """Return the file name of one layer's weights in DeepSpeed's PipelineModule."""
    return f"layer_{layer:02d}-model_{tp_rank:02d}-model_states.pt"


def rank_file(rank: int) -> str:
    """Return the name of the file of one model-parallel rank."""
    return f"mp_rank_{rank:02d}_model_states.pt"


def engine_fields(step: int, ranks: int, **more: object) -> dict[str, object]:
    """Return what the file that an engine reads first holds beside the weights: step counters and sizes."""
    return {
        "optimizer": None,
        "lr_scheduler": None,
        "global_steps": step,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": ranks,
        **more,
    }


def engine_state(step: int, ranks: int, **more: object) -> bytes:
    """Return the content of that file without weights."""
    file = io.BytesIO()
    torch.save({"module": None, **engine_fields(step, ranks, **more)}, file)
    return file.getvalue()


def checkpoint_in(folder: str) -> str:
    """Return the folder of the checkpoint that a folder's `latest` names, or the folder itself if it has none.

    Raises:
        UserError: the checkpoint is not there.
    """
    path = os.path.join(folder, LATEST)
    if not os.path.lexists(path):
        return folder
    with open(check_file(path), encoding="utf-8", errors="replace") as file:
        tag = file.read(1000).strip()
    where = os.path.join(folder, tag)
    if not tag or os.path.basename(tag) != tag or tag in (".", "..") or not os.path.isdir(where):
        raise UserError(f"{path}: names {tag!r}, which is not there; copy it again, or give one of the others")
    return where


def foreign_names(folder: str) -> tuple[str, list[str]]:
    """Return the checkpoint in a folder, and the names of its files; none if it is missing or of this project."""
    try:
        where = checkpoint_in(folder)
    except UserError:
        return folder, []
    names = os.listdir(where)
    return where, [] if DESCRIPTION in names else names


def layer_parts(where: str) -> dict[int, RankParts]:
    """Return the weights of each layer of a pipeline by its number.

    Raises:
        UserError: a file is missing or damaged.
    """
    found = [(int(m[1]), int(m[2])) for name in os.listdir(where) if (m := LAYER_FILE.fullmatch(name))]
    ranks = max((rank for _, rank in found), default=-1) + 1
    layers = {}
    for layer in sorted({layer for layer, _ in found}):
        paths = tuple(check_file(os.path.join(where, layer_file(layer, rank))) for rank in range(ranks))
        layers[layer] = RankParts(paths, tuple(torch_tensors(path) for path in paths))
    return layers


def layer_holds(where: str, layer: int, name: str) -> bool:
    """Return whether the file of a layer can be read and holds the tensor `name`."""
    path = os.path.join(where, layer_file(layer, 0))
    try:
        return os.path.exists(path) and name in torch_tensors(path)
    except UserError:
        return False


def rank_paths(where: str) -> list[str]:
    """Return the paths of the files of all model-parallel ranks.

    Raises:
        UserError: one is missing.
    """
    found = [int(m[1]) for name in os.listdir(where) if (m := RANK_FILE.fullmatch(name))]
    return [check_file(os.path.join(where, rank_file(rank))) for rank in range(max(found, default=0) + 1)]


def engine_content(path: str) -> dict[str, Any]:
    """Return what an engine wrote of one model-parallel rank, with tensors that have no data.

    Raises:
        UserError: the file is damaged or of another kind.
    """
    content = torch_content(path, inert=True)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no state of DeepSpeed's engine; copy the file again")
    return content


def module_tensors(path: str, content: Mapping[str, Any]) -> dict[str, Stored]:
    """Return the weights in an engine's file by name; nested dicts are joined by dots, and empty ones left out.

    Raises:
        UserError: it holds something else than tensors, or nothing.
    """
    tensors = flat(content.get("module"))
    if other := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path}: {other[0]} is no plain tensor; save the weights in bf16, fp16 or fp32")
    if not tensors:
        raise UserError(f"{path}: holds no weights, and there are no layer files; copy the checkpoint again")
    return located(path, tensors)
