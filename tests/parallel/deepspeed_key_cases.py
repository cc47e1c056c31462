"""The keys of a DeepSpeed JSON under save, resume and start_from: a value other than the default for each, or a reason.

The reason says why a key cannot change what a checkpoint holds or how an engine takes it in, or why it cannot be tried.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from llama_ds.config.deepspeed_effects import USES
from llama_ds.config.schema import RunConfig
from llama_ds.layout.layout import Layout
from tests.parallel.layout_cases import Case

_PRINTS = "prints, and changes no tensor"
_PROFILE = "the profiler counts in hooks, and changes no tensor"
_ON_CUDA = "its kernels need CUDA; masters and moments stay those of ZeRO-3 without it"
PERSISTENT = 500  # elements: ZeRO-3 partitions matrices and holds norms on every rank, as in a large model


@dataclass(frozen=True)
class Engine:
    """An engine of `deepspeed_effects` on two ranks."""

    optimizer: str  # the class that holds the masters
    case: Case
    settings: dict[str, Any]


ENGINES = {
    "0": Engine("AdamW", Case(dp=2, zero=0), {}),
    "1": Engine("DeepSpeedZeroOptimizer", Case(dp=2), {}),
    "2": Engine("DeepSpeedZeroOptimizer", Case(dp=2, zero=2), {}),
    "1-bf16": Engine("BF16_Optimizer", Case(dp=2), {"bf16": {"enabled": True}}),
    "3": Engine(
        "DeepSpeedZeroOptimizer_Stage3",
        Case(dp=2, zero=3),
        {"zero_optimization": {"param_persistence_threshold": PERSISTENT}},
    ),
    "pp": Engine("PipelineOptimizer", Case(pp=2), {}),
}


@dataclass(frozen=True)
class Value:
    """A value to try, together with those of the same group; `only` names the engines that can take it, if not all."""

    value: Any
    group: int = 1
    only: tuple[str, ...] = ()


# Groups: 1 for buckets and gathers, 2 for what excludes one of these, 3 for dtypes and offload, 4 for scales.
VALUES: dict[str, Value] = {
    "zero_optimization.stage": Value(None),  # the engine has its own
    "zero_optimization.contiguous_gradients": Value(False),
    "zero_optimization.reduce_scatter": Value(False),
    "zero_optimization.reduce_bucket_size": Value(4000),
    "zero_optimization.use_multi_rank_bucket_allreduce": Value(False),
    "zero_optimization.allgather_bucket_size": Value(1000),
    "zero_optimization.overlap_comm": Value({"2": True, "3": False}),
    "zero_optimization.sub_group_size": Value(4000),
    "zero_optimization.prefetch_bucket_size": Value(1000),
    "zero_optimization.param_persistence_threshold": Value(0),
    "zero_optimization.model_persistence_threshold": Value(100, 2),
    "zero_optimization.max_live_parameters": Value(4000),
    "zero_optimization.max_reuse_distance": Value(0),
    "zero_optimization.use_all_reduce_for_fetch_params": Value(True),
    "zero_optimization.allgather_sequential": Value(True, 2),
    "zero_optimization.ignore_unused_parameters": Value(False),
    "zero_optimization.round_robin_gradients": Value(True),
    "zero_optimization.parameter_alignment": Value(True),
    "zero_optimization.zero_hpz_partition_size": Value(2, 2),
    "zero_optimization.memory_efficient_linear": Value(False),
    "zero_optimization.enable_sanity_checks": Value(True, 2),
    "zero_optimization.offload_param": Value({"device": "cpu"}, 3),
    "zero_optimization.offload_param.device": Value("cpu", 3),
    "zero_optimization.offload_param.pin_memory": Value(False, 3),
    "zero_optimization.offload_optimizer": Value({"device": "cpu"}, 3),
    "zero_optimization.offload_optimizer.device": Value("cpu", 3),
    "zero_optimization.offload_optimizer.pin_memory": Value(False, 3),
    "bf16.enabled": Value(True, 3, ("2", "3", "pp")),
    "bf16.immediate_grad_update": Value(False),
    "data_types.grad_accum_dtype": Value("bf16", 3, ("2", "3")),
    "communication_data_type": Value("bf16", 3),
    "prescale_gradients": Value(True, 4, ("1",)),
    "gradient_predivide_factor": Value(2.0, 4, ("1",)),
}
REASONS: dict[str, str] = {
    "zero_optimization.zero_quantized_weights": _ON_CUDA,
    "zero_optimization.zero_quantized_gradients": _ON_CUDA,
    "zero_optimization.log_trace_cache_warnings": _PRINTS,
    "data_types.param_dtype": "it can only repeat the dtype of the training",
    "wall_clock_breakdown": _PRINTS,
    "memory_breakdown": _PRINTS,
    "log_level": _PRINTS,
    "disable_python_gc": "collecting garbage changes no tensor",
    **{key: _PROFILE for key in USES if key.startswith("flops_profiler.")},
}


@dataclass(frozen=True)
class KeyCase:
    """Some keys at their values in one engine."""

    engine: str
    keys: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.engine}: {', '.join(self.keys)}"

    def alone(self) -> list[KeyCase]:
        """Return a case for each key, to find the one at fault."""
        return [KeyCase(self.engine, (key,)) for key in self.keys]

    @property
    def case(self) -> Case:
        dtype = "bf16" if self.settings.get("bf16", {}).get("enabled") else "fp32"
        return replace(ENGINES[self.engine].case, layers=2, micro_batch=4, dtype=dtype)

    @property
    def settings(self) -> dict[str, Any]:
        """The DeepSpeed settings."""
        engine = ENGINES[self.engine]
        settings: dict[str, Any] = {"zero_optimization": {"stage": engine.case.zero}}
        _merge(settings, engine.settings)
        for key in self.keys:
            value = VALUES[key].value
            if isinstance(value, dict) and self.engine in value:
                value = value[self.engine]
            if value is not None:
                for word in reversed(key.split(".")):
                    value = {word: value}
                _merge(settings, value)
        return settings

    def run(self, folder: str) -> RunConfig:
        """Return the run, with its checkpoints in `folder`."""
        run = self.case.run
        data = replace(run.data, tokenizer=__file__)  # any file
        return replace(run, output_dir=folder, data=data, deepspeed=self.settings)

    @property
    def layout(self) -> Layout:
        return self.case.layout


def _merge(settings: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in other.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            _merge(settings[name], value)
        else:
            settings[name] = copy.deepcopy(value)


def engines_of(key: str) -> Iterable[str]:
    """Return the engines in which a key is tried: one for each class of optimizer that it works with."""
    possible = VALUES[key].only or USES[key].works_in
    return {ENGINES[name].optimizer: name for name in ENGINES if name in possible}.values()


def key_cases() -> list[KeyCase]:
    """Return the cases: the keys of each group in each engine."""
    found: dict[tuple[str, int], list[str]] = {}
    for key, tried in VALUES.items():
        for engine in engines_of(key):
            found.setdefault((engine, tried.group), []).append(key)
    return [KeyCase(engine, tuple(keys)) for (engine, _), keys in found.items()]
