"""DeepSpeed's checkpoint files, as state dicts of live tensors that nobody has written yet."""

from __future__ import annotations

import os
import re
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from llama_ds.layout.weights import TABLE, TIED_MODULES


def _patterns(cut: int | None) -> list[str]:
    """Return patterns of the names of weights that tensor-parallel ranks cut along one dimension."""
    return [rf".*\.{re.escape(weight.name)}" for weight in TABLE if weight.cut == cut]


# What DeepSpeed's ds_to_universal asks for: how tensor-parallel ranks cut weights, as patterns of their names.
UNIVERSAL = {
    "universal_checkpoint_version": 0.2,
    "parameter_with_row_parallelism_patterns": _patterns(1),
    "tp_replicated_parameter_patterns": _patterns(None),
}
TIED = {"pipeline_replicated_parameter_patterns": [rf"{re.escape(TIED_MODULES)}.*"]}


def state_files(engine: Any, tag: str, tied_stages: bool) -> list[tuple[str, Any]]:
    """Return this rank's share of the files of a checkpoint: (name, content). Collective.

    `tied_stages`: the first and the last stage of a pipeline hold one table.
    """
    collected = _Collector()
    usual, engine.checkpoint_engine = engine.checkpoint_engine, collected
    engine._copy_recovery_script = lambda _: None  # zero_to_fp32.py, which cannot read a pipeline's files
    try:
        info = {**UNIVERSAL, **(TIED if tied_stages else {})}
        engine.save_checkpoint(".", tag, client_state={"universal_checkpoint_info": info}, save_latest=False)
    finally:
        engine.checkpoint_engine = usual
    return collected.files


class _Collector(CheckpointEngine):
    """Stands where DeepSpeed would write."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[tuple[str, Any]] = []

    def create(self, info: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        self.files.append((os.path.basename(path), state_dict))

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError("it collects")

    def commit(self, info: Any) -> bool:
        return True

    def preserves_storage_sharing(self) -> bool:
        return False  # or DeepSpeed would copy every weight first
