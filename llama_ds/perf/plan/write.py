"""Writes a planned layout as files for the trainer: a run YAML and the DeepSpeed JSON that it names."""

from __future__ import annotations

import json
from pathlib import Path

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


def write(run: RunConfig, folder: str | Path) -> tuple[Path, Path]:
    """Write run file and DeepSpeed JSON to `folder`, and check that the trainer can load them.

    Raises:
        UserError: The folder cannot be written to.
    """
    yaml_path, json_path = Path(folder, f"{run.name}.yaml"), Path(folder, f"{run.name}_deepspeed.json")
    try:
        yaml_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(run.deepspeed, indent=2) + "\n", encoding="utf-8")
        yaml_path.write_text(run_file(run, json_path.name), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write {folder}: cannot be written: {error.strerror}; give a writable folder") from None
    load_run(str(yaml_path))
    return yaml_path, json_path
