"""From what a user names to a model: a run or checkpoint of this project, a folder of Hugging Face's or of Meta's.

`open_model` finds the weights in the files, `load_model` builds the model of them.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from llama_ds.checkpoint.formats.huggingface import holds_huggingface, open_huggingface
from llama_ds.checkpoint.formats.inventory import with_vocabulary
from llama_ds.checkpoint.formats.meta import holds_meta, open_meta
from llama_ds.checkpoint.manifest import DESCRIPTION, Description
from llama_ds.checkpoint.store import LATEST, newest
from llama_ds.checkpoint.weights import ModelFiles, open_checkpoint
from llama_ds.config.reader import Place, read
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.model.attention import CausalAttention, choose_backend
from llama_ds.model.cpu_products import choose_products
from llama_ds.model.decoder import Shared
from llama_ds.model.llama import Llama
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.rope import RotaryTables
from llama_ds.model.tensor_parallel import SingleRank


def open_model(path: str, kind: str | None = None, vocab_size: int | None = None) -> ModelFiles:
    """Return the weights of a model folder; nothing but headers is read.

    Args:
        path: a run folder or its checkpoints folder (the newest), a checkpoint, a Hugging Face or a Meta folder.
        kind: one of `choices.KINDS`; None: what the files look like.
        vocab_size: rows to give the tables of the vocabulary; None: they must be as many as the configuration says.

    Raises:
        UserError: no such folder, or a damaged one.
    """
    kind = kind or kind_of(path)
    if kind == "deepspeed":
        files = open_checkpoint(locate(path))
        if vocab_size is None:
            return files
        model, tensors = with_vocabulary(files.model, files.tensors, vocab_size)
        return replace(files, model=model, tensors=tensors)
    if not os.path.isdir(path):
        raise _no_folder(path)
    return (open_huggingface if kind == "hf" else open_meta)(path, vocab_size)


def kind_of(path: str) -> str:
    """Return which of `choices.KINDS` a folder is.

    Raises:
        UserError: none of them.
    """
    if not os.path.isdir(path):
        raise _no_folder(path)
    run = os.path.join(path, "checkpoints")
    ours = (os.path.join(path, DESCRIPTION), os.path.join(path, LATEST), os.path.join(run, LATEST))
    if any(map(os.path.lexists, ours)) or newest(path) or newest(run):
        return "deepspeed"
    found = [kind for kind, holds in (("hf", holds_huggingface), ("meta", holds_meta)) if holds(path)]
    if len(found) != 1:
        what = (
            "config.json and Meta's params.json both"
            if found
            else f"none of {DESCRIPTION}, {LATEST}, config.json, params.json"
        )
        raise UserError(
            f"{path}: {what} in it; give a run, a checkpoint, a Hugging Face or a Meta folder"
            + (", and say which with --from" if found else "")
        )
    return found[0]


def locate(path: str) -> str:
    """Return the checkpoint folder that `path` names: itself, or the newest of a checkpoints folder or a run folder.

    Raises:
        UserError: there is none.
    """
    if not os.path.isdir(path):
        raise UserError(
            f"{path}: no such folder; give a run (runs/NAME) or a checkpoint (.../checkpoints/step_00000100)"
        )
    if os.path.exists(os.path.join(path, DESCRIPTION)):
        return path
    for folder in (path, os.path.join(path, "checkpoints")):
        if tag := newest(folder):
            return os.path.join(folder, tag)
    raise UserError(
        f"{path}: neither {DESCRIPTION}, nor {LATEST}, nor checkpoints/{LATEST} in it, so no complete checkpoint; "
        "give a run (runs/NAME), its checkpoints folder, or one checkpoint"
    )


def run_of(folder: str, description: Description) -> RunConfig:
    """Return the run that wrote the checkpoint `folder`."""
    return read(RunConfig, description.run, Place(os.path.join(folder, DESCRIPTION)))


def load_model(files: ModelFiles, device: torch.device, dtype: torch.dtype, document_mask: bool = False) -> Llama:
    """Return the whole model on one device, in evaluation mode; beside it no more than a layer is in memory.

    Raises:
        UserError: a broken file.
    """
    if device.type == "cpu":
        choose_products()
    shared = Shared(
        model=files.model,
        seed=0,
        tp=SingleRank(),
        # Not the backend of the run that trained it: this device may lack it.
        attention=CausalAttention(choose_backend("auto", device.type, dtype, files.model.head_dim)),
        rotary=RotaryTables(files.model, files.seq_len),
        document_mask=document_mask,
    )
    model = Llama(shared, NextTokenLoss(shared.tp)).to(device, dtype)
    for index in files.layers():
        model.layers[index].load_state_dict(files.layer(index))
    return model.eval()


def _no_folder(path: str) -> UserError:
    reason = ": a link to nothing or to itself" if os.path.islink(path) else ""
    return UserError(
        f"{path}: no such folder{reason}; give a run (runs/NAME), a checkpoint, a Hugging Face or a Meta folder"
    )
