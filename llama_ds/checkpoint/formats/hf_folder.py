"""The tensors of a Hugging Face folder: which of several weight files count, and names without prefixes of wrappers.

Of several sets of weights the one is read that transformers (4.57 and 5) loads: the file that config.json names in
`transformers_weights`, model.safetensors, the files of model.safetensors.index.json, pytorch_model.bin, the files of
pytorch_model.bin.index.json.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_ds.checkpoint.formats.hf_config import read_object
from llama_ds.checkpoint.formats.inventory import check_file, check_names, shown, some_tensors
from llama_ds.checkpoint.stored import Stored, safetensors_tensors, torch_tensors
from llama_ds.errors import UserError

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")  # PEFT's
ZERO_SHARDS = re.compile(r"global_step\d+|(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt")  # DeepSpeed's
FSDP_SHARDS = re.compile(r"pytorch_model_fsdp(_\d+|\.bin)")  # accelerate's
WEIGHTS = re.compile(r"(model|pytorch_model|consolidated)\b.*\.(safetensors|bin|pth)(\.index\.json)?")
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
BARE = re.compile(r"(layers|embed_tokens|norm)\.")  # names of a LlamaModel without its language-modelling head


@dataclass(frozen=True)
class FolderTensors:
    """The tensors of a folder by their names in transformers."""

    path: str  # to be named in messages about the tensors
    tensors: dict[str, Stored]
    notes: tuple[str, ...] = ()  # what was left out or renamed


def folder_tensors(folder: str, config: Mapping[str, Any]) -> FolderTensors:
    """Return the tensors that transformers loads from a folder with this config.json. Only headers are read.

    Raises:
        UserError: there is no model, or only an optimizer's shards; a file is missing or damaged; two
            files hold the same tensor.
    """
    name = _weights_file(folder, config)
    path = check_file(os.path.join(folder, name))
    find = safetensors_tensors if ".safetensors" in name else torch_tensors
    used = {name}
    if name.endswith(INDEX):
        files = _files_of_index(path)
        used |= files.keys()
        found = _of_files({os.path.join(folder, file): wanted for file, wanted in files.items()}, find)
    else:
        found = find(path)
    tensors, renamed = _without_wrappers(path, found)
    ignored = sorted(n for n in os.listdir(folder) if WEIGHTS.fullmatch(n) and n not in used)
    notes = [f"{path}: is read, as transformers does; not read: {shown(ignored)}"] if ignored else []
    if renamed:
        notes.append(f"{path}: prefixes of wrappers were removed from the names of tensors: {shown(renamed)}")
    if any(0 in tensor.shape for tensor in tensors.values()) and _shards(folder, ZERO_SHARDS):
        raise _only_shards(folder)
    return FolderTensors(path, tensors, tuple(notes))


def refuse_adapter(folder: str) -> None:
    """Refuse the folder of an adapter, which has no model's weights, or changes those that it has.

    Raises:
        UserError: the folder holds a file of PEFT.
    """
    for name in ADAPTERS:
        if os.path.lexists(os.path.join(folder, name)):
            raise UserError(
                f"{os.path.join(folder, name)}: belongs to an adapter (PEFT), whose weights are added to those of a "
                "base model; merge them with PEFT's merge_and_unload and give the folder that save_pretrained writes"
            )


def _weights_file(folder: str, config: Mapping[str, Any]) -> str:
    """Return the name of the weight file or index that transformers reads."""
    named = config.get("transformers_weights")
    if isinstance(named, str):
        if os.path.basename(named) != named or not named.endswith((".safetensors", ".safetensors" + INDEX)):
            raise UserError(f"{folder}: transformers_weights = {named!r} of config.json is no safetensors file there")
        return named
    for name in (SAFETENSORS, SAFETENSORS + INDEX, BIN, BIN + INDEX):
        if os.path.lexists(os.path.join(folder, name)):
            return name
    if _shards(folder, ZERO_SHARDS):
        raise _only_shards(folder)
    if shards := _shards(folder, FSDP_SHARDS):
        raise UserError(
            f"{os.path.join(folder, shards[0])}: holds FSDP's shards, not a model's weights; merge them with "
            "`accelerate merge-weights` and give the folder that it writes, with config.json"
        )
    raise UserError(f"{folder}: contains neither {SAFETENSORS} nor {BIN}, nor an index of them; copy the model again")


def _shards(folder: str, pattern: re.Pattern[str]) -> list[str]:
    return sorted(name for name in os.listdir(folder) if pattern.fullmatch(name))


def holds_zero_shards(folder: str) -> bool:
    """Return whether a folder holds checkpoints of DeepSpeed's ZeRO that another program wrote."""
    return bool(_shards(folder, ZERO_SHARDS))


def _only_shards(folder: str) -> UserError:
    name = os.path.join(folder, _shards(folder, ZERO_SHARDS)[0])
    return UserError(
        f"{name}: holds DeepSpeed's ZeRO shards, and the folder has no complete weights; run its zero_to_fp32.py "
        "(python zero_to_fp32.py . pytorch_model.bin), which writes them there"
    )


def _files_of_index(path: str) -> dict[str, set[str]]:
    """Return the names of the tensors in each file of an index."""
    where = read_object(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{path}: contains no weight_map, so it is not the index of a model's files; copy it again")
    files: dict[str, set[str]] = {}
    for name, file in where.items():
        if not isinstance(file, str) or os.path.basename(file) != file or not file:
            raise UserError(
                f"{path}: puts {name} into {file!r}, which is not a file name in this folder; copy it again"
            )
        files.setdefault(file, set()).add(name)
    return files


def _of_files(files: Mapping[str, set[str]], find: Any) -> dict[str, Stored]:
    """Return the tensors of all files of an index."""
    found: dict[str, Stored] = {}
    for path, wanted in files.items():
        tensors: dict[str, Stored] = find(check_file(path))
        check_names(path, sorted(wanted), [name for name in tensors if name in wanted])
        if twice := sorted(tensors.keys() & found.keys()):
            raise UserError(
                f"{path}: {some_tensors(twice)} also in {os.path.basename(found[twice[0]].path)}: files of two "
                "exports, and no rule says which counts; copy the model again into an empty folder"
            )
        found.update(tensors)
    return found


def _without_wrappers(path: str, found: dict[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """Return the tensors by names without prefixes, and the names that had some."""
    renamed = {name: _plain(name) for name in found}
    tensors: dict[str, Stored] = {}
    for name, plain in renamed.items():
        if plain in tensors:
            raise UserError(f"{path}: {name} and another tensor are both {plain}; copy the model again")
        tensors[plain] = found[name]
    return tensors, [name for name, plain in renamed.items() if plain != name]


def _plain(name: str) -> str:
    """Return the name of a tensor in LlamaForCausalLM."""
    plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    plain = re.sub(r"^(model\.)+(?=model\.|lm_head\.)", "", plain)
    return f"model.{plain}" if BARE.match(plain) else plain
