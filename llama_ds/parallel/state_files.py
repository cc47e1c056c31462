"""DeepSpeed's checkpoint files, as state dicts of live tensors that nobody has written yet."""

from __future__ import annotations

import os
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

# What DeepSpeed's ds_to_universal asks for: how tensor-parallel ranks cut weights, as patterns of their names.
UNIVERSAL = {
    "universal_checkpoint_version": 0.2,
    "parameter_with_row_parallelism_patterns": [r".*\.(o_proj|down_proj)\.weight"],
    "tp_replicated_parameter_patterns": [r".*norm\.weight"],
}
TIED = {"pipeline_replicated_parameter_patterns": [r"tied_modules\..*"]}


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
