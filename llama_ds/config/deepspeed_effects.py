"""The keys of a DeepSpeed JSON that are passed on or refused: DeepSpeed's default, where a key works, and what it does.

A key that would have no effect is refused, so that nobody believes it has one. DeepSpeed's default may always be
written. The engines read a key or not, depending on the ZeRO stage:

    0        ZeRO-0, fp32
    1        ZeRO-1 in fp32, with offload_optimizer, or with gradients accumulated in bf16
    1-bf16   ZeRO-1 in bf16 otherwise: DeepSpeed's BF16_Optimizer
    2, 3     ZeRO-2, ZeRO-3
    pp       this project's pipeline engine (parallel.pp > 1)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

EVERY = ("0", "1", "1-bf16", "2", "3", "pp")
_ZERO = ("1", "2", "3")
_BUCKETS = ("1", "2")
_NVME = "nvme is refused, because checkpoints cannot follow what DeepSpeed swaps there"
_OUR_LEAVES = "the layers that ZeRO-3 must gather as units are set by the engine"
_NO_DEEPCOMPILE = "no step is compiled"
MEGA = 10**6


@dataclass(frozen=True)
class Use:
    """How a key is used: `does` says what it does in the engines `works_in`, or why it is refused if there are none."""

    default: Any
    works_in: tuple[str, ...]
    does: str


def _refused(default: Any, why: str) -> Use:
    return Use(default, (), why)


_ZERO_KEYS: dict[str, Use] = {
    "contiguous_gradients": Use(True, _ZERO, "copies gradients to a contiguous buffer as they are produced"),
    "reduce_scatter": Use(True, _ZERO, "reduces gradients by reduce-scatter instead of all-reduce"),
    "reduce_bucket_size": Use(500 * MEGA, _ZERO, "elements that are reduced at once"),
    "use_multi_rank_bucket_allreduce": Use(True, _BUCKETS, "reduces the buckets of several ranks by one all-reduce"),
    "allgather_partitions": _refused(True, "DeepSpeed 0.19.8 does not read it"),
    "allgather_bucket_size": Use(500 * MEGA, ("1", "1-bf16", "2"), "elements that are gathered at once after a step"),
    "overlap_comm": Use(None, _ZERO, "reduces gradients while the backward computes; null: only with ZeRO-3"),
    "compute_grad_norm": _refused(True, "clipping needs the norm"),
    "load_from_fp32_weights": _refused(True, "checkpoints here have a loader of their own, which reads fp32 masters"),
    "elastic_checkpoint": _refused(False, "checkpoints here resume under every layout as they are"),
    "zenflow": _refused(None, "it applies most gradients late, so that losses would differ from AdamW's"),
    "sub_group_size": Use(1000 * MEGA, ("3",), "elements that the optimizer updates at once"),
    "prefetch_bucket_size": Use(50 * MEGA, ("3",), "elements that are gathered ahead of their use"),
    "param_persistence_threshold": Use(100_000, ("3",), "smaller weights are not partitioned"),
    "model_persistence_threshold": Use(sys.maxsize, ("3",), "elements of weights that are not partitioned, at most"),
    "max_live_parameters": Use(1000 * MEGA, ("3",), "elements of gathered weights on a device, at most"),
    "max_reuse_distance": Use(1000 * MEGA, ("3",), "a weight used again within so many elements stays gathered"),
    "gather_16bit_weights_on_model_save": _refused(False, "tools/convert.py exports a checkpoint"),
    "module_granularity_threshold": _refused(0, _OUR_LEAVES),
    "use_all_reduce_for_fetch_params": Use(False, ("3",), "gathers weights by all-reduce"),
    "allgather_sequential": Use(False, ("3",), "gathers weights one by one, without a bucket"),
    "ignore_unused_parameters": Use(True, ("2",), "false: a weight without a gradient is an error"),
    "legacy_stage1": _refused(False, "DeepSpeed 0.19 has no other ZeRO-1"),
    "round_robin_gradients": Use(False, _BUCKETS, "distributes gradients over ranks weight by weight"),
    "parameter_alignment": Use(False, _BUCKETS, "begins each weight in the flat buffers at a multiple of 16 bytes"),
    "zero_hpz_partition_size": Use(1, ("3",), "ranks that share a second copy of the weights on one host; without tp"),
    "zero_quantized_weights": Use(False, ("3",), "gathers weights in int8, on CUDA only; losses change"),
    "zero_quantized_nontrainable_weights": _refused(False, "all weights are trained"),
    "zero_quantized_gradients": Use(False, ("3",), "reduces gradients in int4, on CUDA, without tp; losses change"),
    "memory_efficient_linear": Use(True, ("3",), "saves no copies of gathered weights for the backward"),
    "pipeline_loading_checkpoint": _refused(False, "checkpoints here have a loader of their own"),
    "override_module_apply": _refused(True, "no layer is built with Module.apply"),
    "log_trace_cache_warnings": Use(False, ("3",), "logs when the order of gathers changes"),
    "enable_sanity_checks": Use(False, ("3",), "checks the order of gathers and reductions on all ranks; slow"),
    "save_muon_momentum_buffer_in_memory": _refused(False, "Muon here is not DeepSpeed's"),
    "leaf_module": _refused(None, _OUR_LEAVES),
    "offload_param": Use(None, ("3",), "keeps weights in the host's memory"),
    "offload_optimizer": Use(None, _ZERO, "keeps the optimizer's states, and its step, on the host"),
}
_OFFLOAD_KEYS: dict[str, Use] = {
    "device": Use("none", _ZERO, "none or cpu; " + _NVME),
    "nvme_path": _refused(None, _NVME),
    "buffer_count": _refused(None, _NVME),
    "buffer_size": _refused(100 * MEGA, _NVME),
    "max_in_cpu": _refused(1000 * MEGA, _NVME),
    "pin_memory": Use(True, _ZERO, "keeps it in page-locked memory"),
    "pipeline_read": _refused(False, _NVME),
    "pipeline_write": _refused(False, _NVME),
    "fast_init": _refused(False, _NVME),
    "ratio": _refused(1.0, "all of the optimizer is offloaded, or nothing"),
    "super_offload": _refused(False, "DeepSpeed's SuperOffload needs an optimizer of its own"),
    "cpuadam_cores_perc": _refused(0.8, "it is for super_offload"),
}
_BUFFER_COUNTS = {"offload_param": 5, "offload_optimizer": 4}
_FP16 = "fp16 is refused; set bf16.enabled"
_AIO = "it is for nvme, which is refused"
_PROFILER = ("0", "1", "1-bf16", "2", "3")


def _section(name: str, keys: Mapping[str, Use]) -> dict[str, Use]:
    return {f"{name}.{key}": use for key, use in keys.items()}


def _offload(name: str, only: tuple[str, ...], *without: str) -> dict[str, Use]:
    keys = {key: use for key, use in _OFFLOAD_KEYS.items() if key not in without}
    keys["buffer_count"] = _refused(_BUFFER_COUNTS[name], _NVME)
    working = {key: Use(use.default, only, use.does) if use.works_in else use for key, use in keys.items()}
    return _section(f"zero_optimization.{name}", working)


USES: dict[str, Use] = {
    "zero_optimization.stage": Use(0, EVERY, "ZeRO stage 0 to 3; 1 with parallel.pp > 1; not 0 with bf16"),
    **_section("zero_optimization", _ZERO_KEYS),
    **_offload("offload_optimizer", _ZERO, "buffer_size", "max_in_cpu"),
    **_offload(
        "offload_param",
        ("3",),
        *("pipeline_read", "pipeline_write", "fast_init", "ratio", "super_offload", "cpuadam_cores_perc"),
    ),
    "bf16.enabled": Use(False, EVERY, 'true, false, or "auto": bf16 where the device computes it natively'),
    "bf16.immediate_grad_update": Use(
        False, ("1-bf16",), "adds gradients to their fp32 sums as they are produced; true here if it is not set"
    ),
    "bf16.check_grad_overflow": _refused(True, "a step whose gradients are not finite is always skipped"),
    "bf16.bf16_master_weights_and_grads": _refused(False, "it rounds gradients; optimizer.masters has bf16 masters"),
    "bf16.bf16_optimizer_states": _refused(False, "optimizer.state_dtype has bf16 states"),
    **_section(
        "fp16",
        {
            "enabled": _refused(False, _FP16),
            "auto_cast": _refused(False, _FP16),
            "loss_scale": _refused(0, _FP16),
            "initial_scale_power": _refused(16, _FP16),
            "loss_scale_window": _refused(1000, _FP16),
            "hysteresis": _refused(2, _FP16),
            "consecutive_hysteresis": _refused(False, _FP16),
            "min_loss_scale": _refused(1, _FP16),
            "fp16_master_weights_and_grads": _refused(False, _FP16),
        },
    ),
    "data_types.grad_accum_dtype": Use(None, EVERY, "fp32 or bf16: dtype of a step's sums of gradients; fp32 here"),
    "data_types.param_dtype": Use(None, EVERY, "must name the dtype of the training"),
    "data_types.buffer_dtype": _refused(None, "the layers have no buffers"),
    "data_types.keep_in_fp32_modules": _refused("auto", "the layers have no buffers"),
    "communication_data_type": Use(
        None, EVERY, "fp32 or bf16: dtype in which gradients are reduced; fp32 here. Pipelines of ours add bf16 in fp32"
    ),
    "seq_parallel_communication_data_type": _refused("fp32", "it is for DeepSpeed's Ulysses"),
    "prescale_gradients": Use(False, _PROFILER, "divides gradients before they are summed, not after"),
    "gradient_predivide_factor": Use(1.0, _PROFILER, "divides gradients by it before, and by the rest after the sum"),
    "disable_allgather": _refused(False, "DeepSpeed 0.19.8 does not read it"),
    "zero_allow_untested_optimizer": _refused(False, "all optimizers here have tests of their own"),
    "zero_force_ds_cpu_optimizer": _refused(True, "an offloaded optimizer is always DeepSpeed's CPU Adam"),
    "wall_clock_breakdown": Use(False, _PROFILER, "rank 0 prints the parts of each step's time"),
    "memory_breakdown": Use(False, _PROFILER, "rank 0 prints the memory before and after each part of a step; slow"),
    "disable_python_gc": Use(False, EVERY, "no cyclic garbage collection while the engine lives"),
    "log_level": Use(None, EVERY, "level of DeepSpeed's own log lines: debug, info, warning, error or critical"),
    "dump_state": _refused(False, "`--dry-run` prints the resolved plan"),
    **_section(
        "flops_profiler",
        {
            "enabled": Use(False, _PROFILER, "profiles one step by DeepSpeed's FLOPs profiler"),
            "recompute_fwd_factor": Use(0.0, _PROFILER, "share of the forward that is recomputed"),
            "profile_step": Use(1, _PROFILER, "the step"),
            "module_depth": Use(-1, _PROFILER, "depth of the report; -1: all"),
            "top_modules": Use(1, _PROFILER, "modules in the summary"),
            "detailed": Use(True, _PROFILER, "prints every module"),
            "output_file": Use(None, _PROFILER, "file of the report; null: stdout"),
        },
    ),
    **_section(
        "comms_logger",
        {
            key: _refused(default, "tools/profile_run.py records every message of a step")
            for key, default in {
                "enabled": False, "prof_all": True, "prof_ops": [], "verbose": False, "debug": False
            }.items()
        },
    ),
    "timers.throughput": _refused(None, "tools/profile_run.py shows where a step's time goes"),
    **_section(
        "aio",
        {
            "block_size": _refused(MEGA + 48_576, _AIO),
            "queue_depth": _refused(8, _AIO),
            "intra_op_parallelism": _refused(1, _AIO),
            "single_submit": _refused(False, _AIO),
            "overlap_events": _refused(True, _AIO),
            "use_gds": _refused(False, _AIO),
        },
    ),
    **_section(
        "compile",
        {
            key: _refused(default, _NO_DEEPCOMPILE)
            for key, default in {
                **dict.fromkeys(("deepcompile", "autoep_non_moe", "free_activation", "offload_activation"), False),
                **dict.fromkeys(("offload_opt_states", "symmetric_memory", "debug_log", "offload_parameters"), False),
                **dict.fromkeys(("sync_before_reduce", "sync_after_reduce", "sync_before_allgather"), False),
                **dict.fromkeys(("sync_after_allgather", "keep_all_input_tensors"), False),
                **dict.fromkeys(("offload_activation_pin_memory", "double_buffer", "keep_int_input_tensors"), True),
                "free_activation_threshold": 10 * 2**20,
                "passes": None,
            }.items()
        },
    ),
}  # fmt: skip
SECTIONS = tuple(dict.fromkeys(key.partition(".")[0] for key in USES if "." in key))
_ALIAS = "stage3_"  # prefix under which DeepSpeed also knows some keys


def used_keys(section: str = "") -> list[str]:
    """Return the known keys in a section, "" for the top level, in both spellings if there are two."""
    start = f"{section}." if section else ""
    names = [key.removeprefix(start).partition(".")[0] for key in USES if key.startswith(start)]
    names += [f"{_ALIAS}{name}" for name in names if is_aliased(f"{start}{name}")]
    return list(dict.fromkeys(names))


def is_aliased(key: str) -> bool:
    """Return whether DeepSpeed also knows a key as `stage3_...`."""
    section, _, name = key.rpartition(".")
    aliased = (
        *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters"),
        *("max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold"),
        *("use_all_reduce_for_fetch_params", "allgather_sequential"),
    )
    return section == "zero_optimization" and name in aliased


def without_effect(data: Mapping[str, Any], engine: str, at: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, reason) for keys that differ from DeepSpeed's default and do nothing in `engine`."""
    for name, value in data.items():
        key = f"{at}{name}"
        use = USES.get(key) or USES.get(f"{at}{str(name).removeprefix(_ALIAS)}")
        if use and engine not in use.works_in and not _is_default(name, value, use.default):
            yield key, value, use.does if not use.works_in else f"it works with {_named(use.works_in)}"
        elif isinstance(value, Mapping):
            yield from without_effect(value, engine, f"{key}.")


def _is_default(name: str, value: Any, default: Any) -> bool:
    if name.startswith("offload_") and isinstance(value, Mapping):
        return value.get("device", "none") == "none"
    if value is None or (value is False and default is None):
        return True
    return bool(value == default) and isinstance(value, bool) == isinstance(default, bool)


def _named(engines: tuple[str, ...]) -> str:
    names = {"1": "ZeRO-1 (fp32 or offloaded)", "1-bf16": "ZeRO-1 (bf16)", "pp": "parallel.pp > 1"}
    words = [names.get(engine, f"ZeRO-{engine}") for engine in engines]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
