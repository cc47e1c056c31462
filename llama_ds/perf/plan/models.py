"""Loads the run to plan, by the path of a run file or by a model size in ds_configs/."""

from __future__ import annotations

from llama_ds.config.run_file import find_run_file, load_run
from llama_ds.config.schema import RunConfig
from llama_ds.perf.plan.sizes import rows_of


def base_run(model: str, seq_len: str | None = None, batch_tokens: int | None = None) -> RunConfig:
    """Return the model's run without its layout, optionally with another sequence length and global batch."""
    path, overrides = find_run_file(model), ["parallel={}"]
    if seq_len:
        overrides.append(f"data.seq_len={seq_len}")
    base = load_run(path, overrides)
    if batch_tokens:
        base = load_run(path, [*overrides, f"training.global_batch={rows_of(batch_tokens, base.data.seq_len)}"])
    return base
