"""Loads the run to plan, by the path of a run file or by a model size in ds_configs/."""

from __future__ import annotations

from dataclasses import replace

from llama_ds.config.row_stages import stage_runs, stages_key
from llama_ds.config.run_file import find_run_file, load_run
from llama_ds.config.schema import ParallelConfig, RunConfig
from llama_ds.perf.plan.sizes import rows_of


def _last_stage(run: RunConfig, batch_tokens: int | None) -> RunConfig:
    stage = stage_runs(run)[-1]
    rows = rows_of(batch_tokens, stage.data.seq_len) if batch_tokens else stage.training.global_batch
    return replace(
        stage,
        data=replace(stage.data, stages=()),
        training=replace(stage.training, global_batch=rows, batch_stages=()),
        parallel=ParallelConfig(),
    )


def stages_of(model: str) -> str:
    """Return the key of the stages that the model's run file has, "" without stages."""
    return stages_key(load_run(find_run_file(model), ["parallel={}"]))


def base_run(model: str, seq_len: str | None = None, batch_tokens: int | None = None) -> RunConfig:
    """Return the model's run without its layout, optionally with another sequence length and global batch.

    A run with stages is planned with the rows of its last stage.
    """
    path, overrides = find_run_file(model), ["parallel={}"]
    if seq_len is not None:
        overrides += [f"data.seq_len={seq_len}", "data.stages=[]"]
    base = load_run(path, overrides)
    if stages_key(base):
        return _last_stage(base, batch_tokens)
    if batch_tokens:
        base = load_run(path, [*overrides, f"training.global_batch={rows_of(batch_tokens, base.data.seq_len)}"])
    return base
