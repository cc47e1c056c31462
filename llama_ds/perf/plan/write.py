"""Writes a planned layout as files for the trainer: a run YAML and the DeepSpeed JSON that it names."""

from __future__ import annotations

import json
import os
from pathlib import Path

from llama_ds.atomic_files import overwrite
from llama_ds.config.recompute import parse
from llama_ds.config.run_file import load_run, resolved
from llama_ds.config.schema import RunConfig
from llama_ds.config.text import dump_yaml
from llama_ds.errors import UserError

_DERIVED = ("path", "deepspeed_path")


def run_file(run: RunConfig, deepspeed_name: str) -> str:
    """Return the run as the text of a run file that names the DeepSpeed JSON `deepspeed_name`."""
    data = {key: value for key, value in resolved(run).items() if key not in _DERIVED}
    data["deepspeed"] = deepspeed_name
    data["training"].pop("steps")  # follows from tokens
    recompute = parse(run.parallel.recompute)
    if recompute and recompute.device_bytes:
        data["parallel"]["recompute"] = {"auto": run.parallel.recompute.removeprefix("auto: ")}
    return dump_yaml(data)


def new_files(name: str, folder: str | Path) -> tuple[Path, Path]:
    """Return the paths of the run file and of the DeepSpeed JSON of the run `name` in `folder`.

    Raises:
        UserError: One exists, and may hold changes of its owner.
    """
    paths = Path(folder, f"{name}.yaml"), Path(folder, f"{name}_deepspeed.json")
    for path in paths:
        if os.path.lexists(path):
            raise UserError(f"--write {folder}: {path} exists, and may hold changes; move it, or give another folder")
    return paths


def write(run: RunConfig, folder: str | Path) -> tuple[Path, Path]:
    """Write run file and DeepSpeed JSON to `folder`, and check that the trainer can load them.

    Raises:
        UserError: The folder cannot be written to, or holds such files.
    """
    yaml_path, json_path = new_files(run.name, folder)
    content = run_file(run, json_path.name)
    try:
        yaml_path.parent.mkdir(parents=True, exist_ok=True)
        overwrite(str(json_path), json.dumps(run.deepspeed, indent=2) + "\n")
        try:
            overwrite(str(yaml_path), content)
        except BaseException:  # without the run file, the same command would refuse to replace the JSON
            json_path.unlink()
            raise
    except OSError as error:
        raise UserError(f"--write {folder}: cannot be written: {error.strerror}; give a writable folder") from None
    load_run(str(yaml_path))
    return yaml_path, json_path
