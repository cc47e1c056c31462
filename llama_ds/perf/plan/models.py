"""The runs that are planned, by the name of a run file or of a size in ds_configs/."""

from __future__ import annotations

from pathlib import Path

from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError, did_you_mean
from llama_ds.perf.plan.sizes import rows_of

FOLDER = Path(__file__).resolve().parents[3] / "ds_configs"


def run_file(name: str) -> str:
    """Return the path of a run file: the one given, or the one in ds_configs/ whose name ends in that size."""
    if name.endswith((".yaml", ".yml")):
        return name
    known = {path.stem: path for path in FOLDER.glob("*.yaml")}
    short = {stem.rpartition("_")[2]: path for stem, path in known.items()}
    found = known.get(name) or short.get(name.lower())
    if not found:
        raise UserError(
            f"{name}: no such model{did_you_mean(name.lower(), [*known, *short])}; use one of "
            f"{', '.join(sorted(short))}, or the path of a run file"
        )
    return str(found)


def base_run(model: str, seq_len: str | None = None, batch_tokens: int | None = None) -> RunConfig:
    """Return the model's run without a layout of its own, with another sequence length and about `batch_tokens`."""
    path, overrides = run_file(model), ["parallel={}"]
    if seq_len:
        overrides.append(f"data.seq_len={seq_len}")
    base = load_run(path, overrides)
    if batch_tokens:
        base = load_run(path, [*overrides, f"training.global_batch={rows_of(batch_tokens, base.data.seq_len)}"])
    return base
