"""From what a user names (a run, its checkpoints, one of them) to a checkpoint folder, its run and its whole model."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from llama_ds.checkpoint.store import DESCRIPTION, LATEST, Description, newest
from llama_ds.checkpoint.weights import CheckpointWeights
from llama_ds.config.reader import Place, read
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.model.llama import Llama, shared_parts
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.tensor_parallel import SingleRank


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


def load_model(folder: str, device: torch.device, dtype: torch.dtype) -> Llama:
    """Return the whole model of a checkpoint folder, whatever layout wrote it, on one device, in evaluation mode.

    Raises:
        UserError: a broken checkpoint.
    """
    weights = CheckpointWeights(folder)
    run = run_of(folder, weights.description)
    run = replace(run, model=replace(run.model, attention_backend="auto"))  # this device may lack the one of training
    shared = shared_parts(run, SingleRank(), device.type, dtype)
    model = Llama(shared, NextTokenLoss(shared.tp, run.optimizer.z_loss)).to(device, dtype)
    for index, state in weights:
        model.layers[index].load_state_dict(state)
    return model.eval()
