"""Runs a dry run: from the run file to the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from llama_ds.checkpoint.model_shape import read_models
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.recompute import AUTO, GIB
from llama_ds.config.row_stages import first_step, stages_key
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.config.section_rules import STOCK_ENGINE
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout
from llama_ds.layout.ranks import choose_ranks
from llama_ds.layout.recompute import ELEMENT_BYTES, USABLE, with_device_memory
from llama_ds.layout.worst_stage import worst_stage
from llama_ds.perf.plan.relief import check_matrices
from llama_ds.training.dry_run.checks import check_ranks
from llama_ds.training.dry_run.report import Check, DryRun, RankReport
from llama_ds.training.dry_run.rows import check_rows


def dry_run(
    run_file: str,
    overrides: Sequence[str],
    slots: Mapping[str, int],
    wanted: str,
    backend: str = "nccl",
    device_gib: float | None = None,
    jobs: int = 2,
) -> DryRun:
    """Simulate the ranks selected by `wanted` of a job on hosts with these slots.

    Args:
        device_gib: memory of a rank's device; None: unknown and not checked.
        jobs: number of ranks that run at the same time.

    Raises:
        UserError: the run file is invalid, or it uses a feature that the dry run does not support.
    """
    started = time.perf_counter()
    read_models()
    run = load_run(run_file, overrides)
    resolve_layout(run, sum(slots.values()))
    run = _with_device(run, device_gib)
    run = worst_stage(run, sum(slots.values()), ELEMENT_BYTES["bf16"])
    layout = resolve_layout(run, sum(slots.values()))
    chosen = choose_ranks(wanted, layout, "--rank")
    if not chosen:
        raise UserError(f"--rank {wanted}: a dry run simulates at least one rank; use 0 to {layout.world - 1}")
    rows = check_rows(run, layout, first_step(run))
    config = deepspeed_config(run, layout, bf16_native=backend == "nccl")
    if device_gib is not None:
        dtype = "bf16" if config["bf16"]["enabled"] else "fp32"
        check_matrices(run, layout, ELEMENT_BYTES[dtype], int(device_gib * GIB))

    # Errors in the run file are reported before the slow imports of torch and DeepSpeed.
    from llama_ds.parallel.world import RankInfo
    from llama_ds.training.dry_run.processes import simulate_ranks
    from llama_ds.training.dry_run.rank import DryRunTask

    local = [index for count in slots.values() for index in range(count)]
    rank_infos = [RankInfo(rank, layout.world, local[rank]) for rank in chosen]
    reports = simulate_ranks(DryRunTask(run, layout, config, backend), rank_infos, jobs)
    checks = [*check_ranks(run, layout, reports), rows, *_check_fit(reports, device_gib)]
    return DryRun(_name(run), layout, backend, reports, checks, time.perf_counter() - started)


def _name(run: RunConfig) -> str:
    if not stages_key(run):
        return run.name
    what = f"rows of {run.data.seq_len}" if run.data.stages else f"{run.training.global_batch:,} rows of a step"
    return f"{run.name} (from step {first_step(run)}, {what}: the stage with the most memory)"


def _with_device(run: RunConfig, device_gib: float | None) -> RunConfig:
    """Return `run` with the device memory filled in and the attention kernels that need a GPU replaced.

    Raises:
        UserError: the run uses a feature that the dry run cannot simulate.
    """
    if run.parallel.recompute == AUTO:
        if device_gib is None:
            raise UserError(
                f"{run.path}: parallel.recompute = auto depends on the device memory, which a dry run cannot query; "
                "pass --device-gib, as in --device-gib 80"
            )
        run = with_device_memory(run, int(device_gib * GIB))
    if run.parallel.pp > 1 and run.parallel.schedule == STOCK_ENGINE:
        raise UserError(
            f"{run.path}: parallel.schedule = {STOCK_ENGINE}: DeepSpeed's own engine receives message shapes over the "
            "wire, which fake messages do not carry; use parallel.schedule = 1f1b for the dry run"
        )
    zero = run.deepspeed.get("zero_optimization", {})
    for section in ("offload_optimizer", "offload_param"):
        if section in zero:
            raise UserError(
                f"{run.deepspeed_path}: zero_optimization.{section}: DeepSpeed's offload needs real memory, which a "
                "dry run does not have; remove it for the dry run"
            )
    # flash_attn needs a GPU; torch's SDPA saves and returns tensors of the same shapes.
    if run.compute.attention_backend in ("auto", "flash_attn"):
        run = replace(run, compute=replace(run.compute, attention_backend="sdpa"))
    return run


def _check_fit(reports: Sequence[RankReport], device_gib: float | None) -> list[Check]:
    if device_gib is None:
        return []
    fullest = max(reports, key=lambda report: report.total)
    usable = int(device_gib * GIB * USABLE)
    text = (
        f"rank {fullest.rank} has the highest peak, {fullest.total / GIB:.2f} GiB, of the {usable / GIB:.2f} GiB "
        f"usable for tensors on a device of {device_gib:g} GiB"
    )
    return [Check("memory", fullest.total <= usable, text)]
