"""The contents of DeepSpeed's checkpoint files as state dicts of live tensors, without writing them."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from llama_ds.config.schema import ModelConfig
from llama_ds.layout.optimizer_states import EXP_AVG, EXP_AVG_SQ
from llama_ds.layout.weights import EMBEDDING, HEAD, TABLE, TIED_MODULES, TIED_TABLE

# Exact names, because a converter takes a pattern for the beginning of a name, and every matrix ends in ".weight".
TABLE_NAMES = {
    EMBEDDING: rf"({re.escape(TIED_MODULES)}{TIED_TABLE}|(layers\.)?0)\.{re.escape(EMBEDDING.name)}$",
    HEAD: rf".*\.{re.escape(HEAD.name)}$",
}
TIED = {"pipeline_replicated_parameter_patterns": [rf"{re.escape(TIED_MODULES)}.*"]}


def universal_info(model: ModelConfig) -> dict[str, Any]:
    """Return the metadata that DeepSpeed's ds_to_universal requires: name patterns of weights by their sharding.

    A pattern that no weight has is an error there.
    """

    def patterns(cut: int | None) -> list[str]:
        return [rf".*\.{re.escape(weight.name)}" for weight in TABLE if weight.cut == cut and weight.present(model)]

    tables = [EMBEDDING] if model.tie_word_embeddings else [EMBEDDING, HEAD]
    return {
        "universal_checkpoint_version": 0.2,
        "vocabulary_parameter_patterns": [TABLE_NAMES[table] for table in tables],
        "original_vocab_size": model.vocab_size,  # the converter drops further rows, the padding
        "parameter_with_row_parallelism_patterns": patterns(1),
        "tp_replicated_parameter_patterns": patterns(None),
    }


def state_files(engine: Any, tag: str, model: ModelConfig, tied_stages: bool) -> list[tuple[str, Any]]:
    """Return this rank's files of a checkpoint: (name, content). Collective.

    `tied_stages`: whether the first and the last stage of a pipeline share the embedding table.
    """
    collected = _Collector()
    original, engine.checkpoint_engine = engine.checkpoint_engine, collected
    engine._copy_recovery_script = lambda _: None  # do not copy zero_to_fp32.py, which cannot read a pipeline's files
    try:
        info = {**universal_info(model), **(TIED if tied_stages else {})}
        engine.save_checkpoint(".", tag, client_state={"universal_checkpoint_info": info}, save_latest=False)
    finally:
        engine.checkpoint_engine = original
    return collected.files


def _with_second_moments(tree: Any) -> Any:
    """Return a tree of dicts and lists in which every first moment has a second one.

    DeepSpeed's ds_to_universal demands both. That of an optimizer without it is zero, one number in the file.
    """
    if type(tree) is list:
        return [_with_second_moments(value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    found = type(tree)((key, _with_second_moments(value)) for key, value in tree.items())
    if EXP_AVG in found and EXP_AVG_SQ not in found:
        found[EXP_AVG_SQ] = torch.zeros(()).expand(found[EXP_AVG].shape)
    return found


class _Collector(CheckpointEngine):
    """Replaces DeepSpeed's checkpoint engine and collects files instead of writing them."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[tuple[str, Any]] = []

    def create(self, info: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        self.files.append((os.path.basename(path), _with_second_moments(state_dict)))

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError("this engine only collects files")

    def commit(self, info: Any) -> bool:
        return True

    def preserves_storage_sharing(self) -> bool:
        return False  # True would make DeepSpeed copy every weight first
