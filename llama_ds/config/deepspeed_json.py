"""The dict for `deepspeed.initialize`: the user's validated DeepSpeed JSON, merged with the run and its layout.

The JSON owns ZeRO, dtypes, buckets, offload and DeepSpeed's own profilers and timers. The run file owns everything
else, and each setting has one owner.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

from llama_ds.config.deepspeed_effects import SECTIONS, used_keys, without_effect
from llama_ds.config.deepspeed_keys import OWNED, REMOVED, REMOVED_ZERO
from llama_ds.config.reader import ConfigSource, check_keys
from llama_ds.config.schema import OptimizerConfig, RunConfig
from llama_ds.config.section_rules import STOCK_ENGINE
from llama_ds.errors import UserError, shortened

FP16 = ("fp16", "float16", "torch.float16", "half")


class BatchSizes(Protocol):
    """The sizes of a layout that DeepSpeed's configuration repeats."""

    @property
    def pp(self) -> int: ...
    @property
    def cp(self) -> int: ...
    @property
    def global_batch(self) -> int: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def accumulation(self) -> int: ...


def check_user_keys(run: RunConfig) -> None:
    """Raise UserError for a key of the DeepSpeed JSON that is unknown, removed, or owned by the run file."""
    for key in run.deepspeed:
        if key in REMOVED:
            raise _error(run, f"{key} was removed in DeepSpeed 0.19; take it out")
        if key in OWNED:
            raise _error(run, f"{key} is not the DeepSpeed file's to set: {OWNED[key]} and take it out here")
    source = ConfigSource(run.deepspeed_path)
    check_keys(run.deepspeed, sorted(used_keys()), source)
    for section in SECTIONS:
        _check_object(run, section, run.deepspeed.get(section, {}))
    for section in ("offload_optimizer", "offload_param"):
        where = f"zero_optimization.{section}"
        block = _section(run, "zero_optimization").get(section) or {}
        _check_object(run, where, block, '{"device": "cpu"}')
        check_keys(block, used_keys(where), source, where)
    for key in REMOVED_ZERO & _section(run, "zero_optimization").keys():
        raise _error(run, f"zero_optimization.{key} was removed in DeepSpeed 0.19; take it out")
    for section in SECTIONS:
        check_keys(_section(run, section), sorted(used_keys(section)), source, section)
    stage = _section(run, "zero_optimization").get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise _error(run, f"zero_optimization.stage = {stage!r} is not 0, 1, 2 or 3")


def _check_object(run: RunConfig, key: str, value: object, example: str = '{"key": value}') -> None:
    if not isinstance(value, dict):
        raise _error(run, f"{key} = {value!r} is not an object such as {example}")


def training_dtype(run: RunConfig, bf16_native: bool) -> str:
    """Return "bf16" or "fp32" from `bf16.enabled`: true, false, or "auto": bf16 where the device computes it natively.

    Raises:
        UserError: any other value, or fp16, whose loss scaling skips steps.
    """
    if _section(run, "fp16").get("enabled", False):
        raise _error(run, "fp16.enabled: this stack trains in bf16 or fp32, without loss scaling; set bf16.enabled")
    enabled = _section(run, "bf16").get("enabled", False)
    if enabled == "auto":
        enabled = bf16_native
    if not isinstance(enabled, bool):
        raise _error(run, f'bf16.enabled = {enabled!r} is not true, false or "auto"')
    return "bf16" if enabled else "fp32"


def deepspeed_config(run: RunConfig, layout: BatchSizes, bf16_native: bool) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`: a new dict; `run` stays as it is.

    `bf16_native` says whether the device computes bf16 natively, for `bf16.enabled: "auto"`.

    Raises:
        UserError: a key belongs to the run file, or DeepSpeed 0.19.8 does not correctly support a combination.
    """
    check_user_keys(run)
    dtype = training_dtype(run, bf16_native)
    _check_combination(run, layout, dtype)
    _check_effect(run, _engine(run, layout, dtype))
    config = copy.deepcopy(run.deepspeed)
    config.pop("fp16", None)
    config["bf16"] = {"enabled": False} if dtype == "fp32" else _bf16(run)
    if dtype == "bf16":
        # DeepSpeed would accumulate in bf16, and reduce in bf16 even where it accumulates in fp32.
        config["data_types"] = {"grad_accum_dtype": "fp32", **_section(run, "data_types")}
        config.setdefault("communication_data_type", "fp32")
    config.update(
        train_batch_size=layout.global_batch * layout.cp,  # DeepSpeed takes dp and cp for one data axis
        train_micro_batch_size_per_gpu=layout.micro_batch,
        gradient_accumulation_steps=layout.accumulation,
        gradient_clipping=run.optimizer.clip,
        steps_per_print=2**31,  # disables DeepSpeed's own log line; the training loop reports
        checkpoint={"tag_validation": "Fail", "parallel_write": {"pipeline_stage": True}},
    )
    if layout.pp > 1:
        # Send full tensors between stages: DeepSpeed's partitioned sends assume equal tensors on all tp ranks, and
        # under sequence parallelism they differ.
        config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}
    return config


def _bf16(run: RunConfig) -> dict[str, Any]:
    block = {**_section(run, "bf16"), "enabled": True}
    if run.zero_stage == 1:  # BF16_Optimizer accumulates in fp32 at once and keeps no bf16 gradients
        block.setdefault("immediate_grad_update", True)
    return block


def _engine(run: RunConfig, layout: BatchSizes, dtype: str) -> str:
    """Return which engine of `deepspeed_effects` trains the run."""
    if run.parallel.own_pipeline:
        return "pp"
    if run.zero_stage == 1 and dtype == "bf16" and run.sums_in_fp32 and not _offloads_optimizer(run):
        return "1-bf16"
    return str(run.zero_stage)


def _offloads_optimizer(run: RunConfig) -> bool:
    block = _section(run, "zero_optimization").get("offload_optimizer") or {}
    return bool(block.get("device", "none") != "none")


def _check_effect(run: RunConfig, engine: str) -> None:
    """Refuse what DeepSpeed accepts and then ignores, or computes nonsense with."""
    for key, value, reason in without_effect(run.deepspeed, engine):
        raise _error(run, f"{key} = {shortened(repr(value))} has no use here; take it out: {reason}")
    for section, key in (("data_types", "grad_accum_dtype"), ("", "communication_data_type")):
        value = (_section(run, section) if section else run.deepspeed).get(key)
        if value in FP16:
            raise _error(run, f"{key} = {value!r}: sums in fp16 overflow without loss scaling; use fp32 or bf16")
    factor = run.deepspeed.get("gradient_predivide_factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < float("inf"):
        raise _error(run, f"gradient_predivide_factor = {factor!r} is not a positive number; take it out")


def _check_combination(run: RunConfig, layout: BatchSizes, dtype: str) -> None:
    stage, pp = run.zero_stage, layout.pp
    if pp > 1 and stage != 1:
        why = "takes the clip norm from one stage only" if stage == 0 else "cannot split what the pipeline accumulates"
        raise _error(run, f"zero_optimization.stage = {stage} with parallel.pp = {pp}: ZeRO-{stage} {why}; use stage 1")
    if dtype == "bf16" and stage == 0:
        raise _error(run, "zero_optimization.stage = 0 with bf16: gradients would be accumulated in bf16; use stage 1")
    if run.parallel.own_pipeline and _offloads_optimizer(run):
        raise _error(
            run,
            f"zero_optimization.offload_optimizer with parallel.pp = {pp}: schedule {run.parallel.schedule} keeps the "
            f"optimizer on the device; take it out, or use parallel.schedule = {STOCK_ENGINE}",
        )
    for section in ("offload_optimizer", "offload_param"):
        device = (_section(run, "zero_optimization").get(section) or {}).get("device", "none")
        if device != "none" and (found := _only_on_device(run.optimizer)):
            key, value, why = found
            default = getattr(OptimizerConfig, key)
            raise _error(
                run,
                f"zero_optimization.{section}.device = {device} with optimizer.{key} = {value}: {why}; take it out, or "
                f"use optimizer.{key} = {default}",
            )
        if device == "nvme":
            raise _error(
                run,
                f"zero_optimization.{section}.device = nvme: checkpoints cannot follow what DeepSpeed swaps there; "
                "use cpu",
            )
    _check_masters(run, layout, dtype)
    _check_neighbours(run)
    if pp > 1 and run.deepspeed.get("wall_clock_breakdown"):
        raise _error(run, f"wall_clock_breakdown with parallel.pp = {pp} crashes DeepSpeed's timers; take it out")
    if pp > 1 and _section(run, "flops_profiler").get("enabled"):
        raise _error(run, f"flops_profiler.enabled with parallel.pp = {pp} crashes DeepSpeed's timers; take it out")


def _only_on_device(optimizer: OptimizerConfig) -> tuple[str, str, str] | None:
    """Return a key of the optimizer that DeepSpeed's CPU Adam cannot follow, its value and why, or None."""
    for key, why in (
        ("name", "DeepSpeed offloads AdamW only"),
        ("state_dtype", "DeepSpeed's CPU Adam has fp32 moments"),
        ("masters", "DeepSpeed's CPU Adam has fp32 masters"),
    ):
        if (value := getattr(optimizer, key)) != getattr(OptimizerConfig, key):
            return key, value, why
    return None


def _check_masters(run: RunConfig, layout: BatchSizes, dtype: str) -> None:
    """Refuse bf16 masters where weights are not bf16, or where DeepSpeed rounds the gradients to the masters' dtype."""
    masters, stage = run.optimizer.masters, run.zero_stage
    if masters == "fp32":
        return
    if dtype != "bf16":
        raise UserError(
            f"{run.path}: optimizer.masters = {masters} in a run in {dtype}; enable bf16, or use fp32 masters"
        )
    stock = layout.pp > 1 and run.parallel.schedule == STOCK_ENGINE
    if _engine(run, layout, dtype) not in ("pp", "1-bf16") or stock or not run.sums_in_fp32:
        where = "parallel.schedule = deepspeed" if layout.pp > 1 else f"zero_optimization.stage = {stage}"
        if not run.sums_in_fp32:
            where = f"data_types.grad_accum_dtype = {_section(run, 'data_types')['grad_accum_dtype']}"
        raise UserError(
            f"{run.path}: optimizer.masters = {masters} with {where}: DeepSpeed makes fp32 masters there, or rounds "
            "gradients to the masters' dtype; use ZeRO-1 with fp32 sums of gradients, or fp32 masters"
        )


def _check_neighbours(run: RunConfig) -> None:
    """Refuse ZeRO++ where it would mix tensor-parallel shards: its groups are consecutive ranks of the world."""
    zero, tp = _section(run, "zero_optimization"), run.parallel.tp
    for key, off in (("zero_hpz_partition_size", 1), ("zero_quantized_gradients", False)):
        if tp > 1 and zero.get(key, off) != off:
            raise _error(
                run,
                f"zero_optimization.{key} with parallel.tp = {tp}: DeepSpeed groups consecutive ranks, which hold "
                "different parts of the weights; take it out, or use parallel.tp = 1",
            )


def _section(run: RunConfig, name: str) -> dict[str, Any]:
    section = run.deepspeed.get(name, {})
    return section if isinstance(section, dict) else {}


def _error(run: RunConfig, rule: str) -> UserError:
    return UserError(f"{run.deepspeed_path}: {rule}")
