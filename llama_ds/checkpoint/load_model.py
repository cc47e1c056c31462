"""Loading a model from a path: a run or checkpoint of this project, or a folder of another format.

`open_model` locates the weights in the files, and `load_model` builds a model with them.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace

import torch

from llama_ds.checkpoint.choices import INCOMPLETE, INCOMPLETE_FOLDERS
from llama_ds.checkpoint.conversion.partial import refuse_unfinished
from llama_ds.checkpoint.formats.dcp import holds_dcp
from llama_ds.checkpoint.formats.engine_files import checkpoint_in
from llama_ds.checkpoint.formats.hf_config import CONFIG
from llama_ds.checkpoint.formats.hf_folder import holds_zero_shards
from llama_ds.checkpoint.formats.huggingface import holds_huggingface, open_huggingface
from llama_ds.checkpoint.formats.inventory import with_vocabulary
from llama_ds.checkpoint.formats.megatron import TRACKER, holds_megatron, open_megatron
from llama_ds.checkpoint.formats.meta import holds_meta, open_meta
from llama_ds.checkpoint.formats.meta_params import PARAMS, Unsaid
from llama_ds.checkpoint.formats.neox import holds_neox, open_neox
from llama_ds.checkpoint.formats.torchtitan import open_torchtitan
from llama_ds.checkpoint.manifest import DESCRIPTION, Description
from llama_ds.checkpoint.store import LATEST, newest
from llama_ds.checkpoint.weights import DTYPES, ModelFiles, open_checkpoint
from llama_ds.config.reader import ConfigSource, read
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.model.build import build_model
from llama_ds.model.llama import Llama

# Formats of others: the file by which each is known, and the check for it.
RECOGNISED = {
    "hf": (CONFIG, holds_huggingface),
    "meta": (f"{PARAMS} or consolidated.NN.pth", holds_meta),
    "megatron": (TRACKER, holds_megatron),
    "neox": ("layers of GPT-NeoX", holds_neox),
    "torchtitan": ("step-N/.metadata of torchtitan", holds_dcp),
}
FOLDERS = "Hugging Face, Meta, Megatron-LM, GPT-NeoX or torchtitan"
SNAPSHOTS = "snapshots"  # folder of the hub's cache
ASKED_FLAG = re.compile(r"convert with (--[a-z-]+)")  # in messages of readers that need one
OPEN = {"meta": open_meta, "megatron": open_megatron, "neox": open_neox, "torchtitan": open_torchtitan}


def open_model(
    path: str, kind: str | None = None, vocab_size: int | None = None, unsaid: Unsaid | None = None
) -> ModelFiles:
    """Return the weights of a model folder. Only headers are read.

    Args:
        path: a run folder or its checkpoints folder (the newest), a checkpoint, or a folder of another format.
        kind: one of `choices.KINDS`; None: detected from the files.
        vocab_size: rows of the vocabulary tables; missing rows become zeros. None: as many as the configuration says.
        unsaid: of a folder of one of `choices.INCOMPLETE`, what its files do not say.

    Raises:
        UserError: the folder does not exist or is damaged, or `unsaid` is needed.
    """
    kind = kind or kind_of(path)
    if kind not in INCOMPLETE and unsaid not in (None, Unsaid()):
        raise UserError(
            f"command line: --rope-factor, --rope-theta, --seq-len and --qkv-order apply only to {INCOMPLETE_FOLDERS}; "
            f"{path} is another: {kind}"
        )
    if unsaid and unsaid.qkv_order and kind in ("meta", "torchtitan"):
        raise UserError(f"command line: --qkv-order does not apply to {path}: its three matrices are apart; omit it")
    if unsaid and unsaid.rope_theta is not None and kind != "megatron":
        raise UserError(f"command line: --rope-theta does not apply to {path}, whose files say it; omit it")
    if kind == "deepspeed":
        files = open_checkpoint(locate(path))
        if vocab_size is None:
            return files
        model, tensors = with_vocabulary(files.model, files.tensors, vocab_size)
        masters = files.masters and with_vocabulary(files.model, files.masters, vocab_size)[1]
        return replace(files, model=model, tensors=tensors, masters=masters)
    if not os.path.isdir(path):
        raise _no_folder(path)
    if kind == "hf":
        return open_huggingface(path, vocab_size)
    return OPEN[kind](path, vocab_size, unsaid)


def open_as_found(path: str, vocab_size: int | None = None, kind: str | None = None) -> ModelFiles:
    """Return `open_model` for a user who has no flags to say what the folder leaves open.

    Raises:
        UserError: as `open_model`; where a flag of tools/convert.py is asked for, with the command that takes it.
    """
    try:
        return open_model(path, kind, vocab_size)
    except UserError as error:
        asked = ASKED_FLAG.search(str(error))
        if asked is None:
            raise
        raise UserError(
            f"{error}. The command is: tools/convert.py {path} NEW --to deepspeed {asked[1]} VALUE; then give NEW "
            "instead of this folder"
        ) from None


def kind_of(path: str) -> str:
    """Return the format of a folder, one of `choices.KINDS`.

    Raises:
        UserError: the folder has none of these formats, or two of them, or a conversion has not finished it.
    """
    if not os.path.isdir(path):
        raise _no_folder(path)
    refuse_unfinished(path)
    run = os.path.join(path, "checkpoints")
    found = {
        "deepspeed": os.path.lexists(os.path.join(path, DESCRIPTION)) or newest(path) or newest(run),
        **{kind: holds(path) for kind, (_, holds) in RECOGNISED.items()},
    }
    kinds = [kind for kind, holds in found.items() if holds]
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        marks = {"deepspeed": "a checkpoint of llama_ds"} | {kind: mark for kind, (mark, _) in RECOGNISED.items()}
        what = " and ".join(f"{marks[kind]} ({kind})" for kind in kinds)
        raise UserError(f"{path}: contains {what}; give a folder with one model, or choose the format with --from")
    if any(os.path.lexists(os.path.join(folder, LATEST)) for folder in (path, run)) or holds_zero_shards(path):
        return "deepspeed"
    if os.path.isdir(os.path.join(path, SNAPSHOTS)):
        raise UserError(
            f"{path}: is a repository in the cache of Hugging Face's hub; give the folder of a snapshot, "
            f"{os.path.join(path, SNAPSHOTS)}/..."
        )
    files = ", ".join(mark for mark, _ in RECOGNISED.values())
    raise UserError(
        f"{path}: contains none of {DESCRIPTION}, {LATEST}, {files}; give a run, a checkpoint, or a folder of {FOLDERS}"
    )


def locate(path: str) -> str:
    """Return the checkpoint folder for `path`: itself, or the newest checkpoint of a run or checkpoints folder.

    Raises:
        UserError: there is no checkpoint.
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
    if holds_zero_shards(path):
        if any(name.startswith("global_step") for name in os.listdir(path)):
            checkpoint_in(path)  # `latest` may name another one, that is not there
        raise UserError(
            f"{path}: holds ZeRO shards that another program wrote with DeepSpeed; run its zero_to_fp32.py "
            "(python zero_to_fp32.py . pytorch_model.bin), put the model's config.json beside the result, and give "
            "that folder"
        )
    raise UserError(
        f"{path}: contains none of {DESCRIPTION}, {LATEST}, checkpoints/{LATEST}, so it has no complete checkpoint; "
        "give a run (runs/NAME), its checkpoints folder, or one checkpoint"
    )


def run_of(folder: str, description: Description) -> RunConfig:
    """Return the run that wrote the checkpoint `folder`."""
    return read(RunConfig, description.run, ConfigSource(os.path.join(folder, DESCRIPTION)))


def load_model(
    source: str | ModelFiles,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    document_mask: bool | None = None,
) -> Llama:
    """Return a trained, unsharded model on one device in evaluation mode. Extra memory: at most one layer.

    Args:
        source: a folder that `open_model` accepts, or the result of `open_model`.
        device: device of weights and computation.
        dtype: dtype of weights and computation; None: the dtype in which the model was trained.
        document_mask: whether attention stays inside the documents of a row; None: as in training.

    Raises:
        UserError: the folder or device does not exist, or a file is damaged.
    """
    files = open_model(source) if isinstance(source, str) else source
    masked = files.document_mask if document_mask is None else document_mask
    dtype = DTYPES[files.dtype] if dtype is None else dtype
    model = build_model(files.model, files.seq_len, device=device, dtype=dtype, document_mask=masked, marks=files.marks)
    for index in files.layers():
        model.layers[index].load_state_dict(files.layer(index))
    return model.eval()


def _no_folder(path: str) -> UserError:
    if os.path.isfile(path):
        return UserError(f"{path}: is a file, and a model is a folder; give the folder that holds it")
    reason = ": a link to nothing or to itself" if os.path.islink(path) else ""
    return UserError(f"{path}: no such folder{reason}; give a run (runs/NAME), a checkpoint, or a folder of {FOLDERS}")
