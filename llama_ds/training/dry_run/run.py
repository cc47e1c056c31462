"""A dry run from its run file to its report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.recompute import AUTO, GIB
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.config.section_rules import STOCK_ENGINE
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout
from llama_ds.layout.ranks import choose_ranks
from llama_ds.layout.recompute import USABLE, with_device_memory
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
    """Run the ranks that `wanted` names, of a job on hosts with these slots.

    Args:
        device_gib: memory of a rank's device; None: not known, and not checked.
        jobs: ranks that run at a time.

    Raises:
        UserError: what the trainer would say of the run file, or what the dry run cannot do.
    """
    started = time.perf_counter()
    run = load_run(run_file, overrides)
    layout = resolve_layout(run, sum(slots.values()))
    run = _definite(run, device_gib)
    chosen = choose_ranks(wanted, layout, "--rank")
    rows = check_rows(run, layout)
    config = deepspeed_config(run, layout, bf16_native=backend == "nccl")

    # Mistakes are said before torch and DeepSpeed are imported, which takes seconds.
    from llama_ds.parallel.world import RankInfo
    from llama_ds.training.dry_run.processes import dry_ranks
    from llama_ds.training.dry_run.rank import DryRunTask

    local = [index for count in slots.values() for index in range(count)]
    places = [RankInfo(rank, layout.world, local[rank]) for rank in chosen]
    reports = dry_ranks(DryRunTask(run, layout, config, backend), places, jobs)
    checks = [*check_ranks(run, layout, reports), rows, *_check_fit(reports, device_gib)]
    return DryRun(run.name, layout, backend, reports, checks, time.perf_counter() - started)


def _definite(run: RunConfig, device_gib: float | None) -> RunConfig:
    """Return `run` as it would be on devices of that memory, with what needs a GPU to be looked at replaced.

    Raises:
        UserError: it needs what there is no stand-in for.
    """
    if run.parallel.recompute == AUTO:
        if device_gib is None:
            raise UserError(
                f"{run.path}: parallel.recompute = auto goes by the memory of the devices, which are not here; "
                "say --device-gib, as in --device-gib 80"
            )
        run = with_device_memory(run, int(device_gib * GIB))
    if run.parallel.pp > 1 and run.parallel.schedule == STOCK_ENGINE:
        raise UserError(
            f"{run.path}: parallel.schedule = {STOCK_ENGINE}: DeepSpeed's own engine receives the shapes of its "
            "messages, which no fake message tells it; use parallel.schedule = 1f1b for the dry run"
        )
    zero = run.deepspeed.get("zero_optimization", {})
    for section in ("offload_optimizer", "offload_param"):
        if section in zero:
            raise UserError(
                f"{run.deepspeed_path}: zero_optimization.{section}: DeepSpeed's offload works on real memory, a dry "
                "run has none; take it out for the dry run"
            )
    # flash_attn wants a GPU to run on; what it keeps and gives is what torch's own kernel does.
    if run.compute.attention_backend in ("auto", "flash_attn"):
        run = replace(run, compute=replace(run.compute, attention_backend="sdpa"))
    return run


def _check_fit(reports: Sequence[RankReport], device_gib: float | None) -> list[Check]:
    if device_gib is None:
        return []
    fullest = max(reports, key=lambda report: report.total)
    usable = int(device_gib * GIB * USABLE)
    text = (
        f"rank {fullest.rank}, the fullest, holds {fullest.total / GIB:.2f} GiB of the {usable / GIB:.2f} GiB that "
        f"{device_gib:g} GiB leave to tensors"
    )
    return [Check("memory", fullest.total <= usable, text)]
