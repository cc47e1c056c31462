"""The merge with the DeepSpeed JSON: who owns which key, and which combinations are refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_ds.config.deepspeed_json import deepspeed_config, training_dtype
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import OptimizerConfig, RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def run_with(deepspeed: dict[str, Any], **parallel: int) -> RunConfig:
    """quickstart.yaml with another DeepSpeed JSON and pp = tp = 1, unless `parallel` says otherwise."""
    cut = {"pp": 1, "tp": 1, "sequence_parallel": False, **parallel}
    run = load_run(str(CONFIGS / "quickstart.yaml"), [f"parallel.{key}={str(v).lower()}" for key, v in cut.items()])
    return replace(run, deepspeed=deepspeed, deepspeed_path="ds.json")


def merged(deepspeed: dict[str, Any], bf16_native: bool = True, world: int = 2, **parallel: int) -> dict[str, Any]:
    run = run_with(deepspeed, **parallel)
    return deepspeed_config(run, resolve_layout(run, world), bf16_native)


def test_bf16_is_accumulated_and_reduced_in_fp32() -> None:
    config = merged({"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}})
    assert config["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"


def test_the_json_may_name_other_dtypes() -> None:
    config = merged(
        {
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True, "immediate_grad_update": False},
            "data_types": {"grad_accum_dtype": "bf16"},
            "communication_data_type": "bf16",
        }
    )
    assert config["bf16"]["immediate_grad_update"] is False
    assert (config["data_types"]["grad_accum_dtype"], config["communication_data_type"]) == ("bf16", "bf16")


def test_auto_is_fp32_where_the_device_has_no_bf16() -> None:
    config = merged({"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}}, bf16_native=False)
    assert config["bf16"] == {"enabled": False}
    assert "data_types" not in config and "communication_data_type" not in config


@pytest.mark.parametrize(
    ("enabled", "native", "dtype"),
    [
        (True, False, "bf16"),
        (False, True, "fp32"),
        ("auto", True, "bf16"),
        ("auto", False, "fp32"),
        (None, True, "fp32"),
    ],
)
def test_training_dtype(enabled: bool | str | None, native: bool, dtype: str) -> None:
    block = {} if enabled is None else {"bf16": {"enabled": enabled}}
    assert training_dtype(run_with(block), native) == dtype


def test_batch_sizes_come_from_the_layout() -> None:
    config = merged({"zero_optimization": {"stage": 1}}, world=2)
    assert config["train_batch_size"] == 16
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2 == 16
    assert config["gradient_clipping"] == 1.0
    assert "pipeline" not in config


def test_pipeline_sends_whole_boundary_tensors() -> None:
    config = merged({"zero_optimization": {"stage": 1}}, pp=2)
    assert config["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}


def test_the_run_stays_as_it_is() -> None:
    run = run_with({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {}})
    before = copy.deepcopy(run)
    config = deepspeed_config(run, resolve_layout(run, 1), True)
    config["zero_optimization"]["stage"] = 3
    assert run == before


def test_user_options_pass_through() -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 10_000_000}
    config = merged({"zero_optimization": zero, "comms_logger": {"enabled": False}, "wall_clock_breakdown": True})
    assert config["zero_optimization"] == zero
    assert config["comms_logger"] == {"enabled": False} and config["wall_clock_breakdown"] is True


ZERO1 = {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("deepspeed", "pp", "message"),
    [
        ({"train_batch_size": 8}, 1, "train_batch_size is not the DeepSpeed file's to set: "
         "set training.global_batch in the run file and take it out here"),
        ({"optimizer": {"type": "Adam"}}, 1, "optimizer is not the DeepSpeed file's to set: "
         "set optimizer.lr, betas, eps and weight_decay in the run file and take it out here"),
        ({"amp": {}}, 1, "amp was removed in DeepSpeed 0.19; take it out"),
        ({"zero_optimization": {"mics_shard_size": 2}}, 1, "zero_optimization.mics_shard_size was removed in "
         "DeepSpeed 0.19; take it out"),
        ({"zero_optimisation": {}}, 1, "zero_optimisation is not a known key (did you mean 'zero_optimization'?)"),
        ({"bf16": {"enable": True}}, 1, "bf16.enable is not a known key (did you mean 'enabled'?)"),
        ({"bfloat16": {"enabled": True}}, 1, "bfloat16 is not a known key (did you mean 'bf16'?)"),
        ({"zero_optimization": True}, 1, 'zero_optimization = True is not an object such as {"key": value}'),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}, 1, "zero_optimization.offload_optimizer = "
         '\'cpu\' is not an object such as {"device": "cpu"}'),
        ({"comms_logger": {"enabled": True}}, 1, "comms_logger.enabled = True has no use here; take it out: "
         "tools/profile_run.py records every message of a step"),
        ({"dump_state": True}, 1, "dump_state = True has no use here; take it out: `--dry-run` prints the resolved "
         "plan"),
        ({**ZERO1, "compile": {"deepcompile": True}}, 2, "compile.deepcompile = True has no use here; take it out: no "
         "step is compiled"),
        ({"zero_optimization": {"stage": 1, "stage3_max_live_parameters": 5}}, 1, "zero_optimization."
         "stage3_max_live_parameters = 5 has no use here; take it out: it works with ZeRO-3"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1e6}, "bf16": {"enabled": True}}, 1,
         "zero_optimization.reduce_bucket_size = 1000000.0 has no use here; take it out: it works with ZeRO-1 (fp32 or "
         "offloaded), ZeRO-2 or ZeRO-3"),
        ({"zero_optimization": {"stage": 3, "zenflow": {}}}, 1, "zero_optimization.zenflow = {} has no use here; take "
         "it out: it applies most gradients late, so that losses would differ from AdamW's"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memry": True}}}, 1,
         "zero_optimization.offload_param.pin_memry is not a known key (did you mean 'pin_memory'?)"),
        ({**ZERO1, "communication_data_type": "fp16"}, 1, "communication_data_type = 'fp16': sums in fp16 overflow "
         "without loss scaling; use fp32 or bf16"),
        ({**ZERO1, "fp16": {"enabled": False, "loss_scale": 128}}, 1, "fp16.loss_scale = 128 has no use here; take it "
         "out: fp16 is refused; set bf16.enabled"),
        ({"gradient_predivide_factor": 0}, 1, "gradient_predivide_factor = 0 is not a positive number; take it out"),
        ({"zero_optimization": {"stage": 4}}, 1, "zero_optimization.stage = 4 is not 0, 1, 2 or 3"),
        ({"bf16": {"enabled": "yes"}}, 1, "bf16.enabled = 'yes' is not true, false or \"auto\""),
        ({"fp16": {"enabled": True}}, 1, "fp16.enabled: this stack trains in bf16 or fp32, without loss scaling; "
         "set bf16.enabled"),
        ({"bf16": {"enabled": True}}, 1, "zero_optimization.stage = 0 with bf16: gradients would be accumulated "
         "in bf16; use stage 1"),
        ({}, 2, "zero_optimization.stage = 0 with parallel.pp = 2: ZeRO-0 takes the clip norm from one stage only; "
         "use stage 1"),
        ({"zero_optimization": {"stage": 2}}, 2, "zero_optimization.stage = 2 with parallel.pp = 2: ZeRO-2 cannot "
         "split what the pipeline accumulates; use stage 1"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, 2,
         "zero_optimization.offload_optimizer with parallel.pp = 2: schedule 1f1b keeps the optimizer on the device; "
         "take it out, or use parallel.schedule = deepspeed"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, 1,
         "zero_optimization.offload_param.device = nvme: checkpoints cannot follow what DeepSpeed swaps there; "
         "use cpu"),
        ({**ZERO1, "wall_clock_breakdown": True}, 2, "wall_clock_breakdown with parallel.pp = 2 crashes DeepSpeed's "
         "timers; take it out"),
        ({**ZERO1, "flops_profiler": {"enabled": True}}, 2, "flops_profiler.enabled with parallel.pp = 2 crashes "
         "DeepSpeed's timers; take it out"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(deepspeed: dict[str, Any], pp: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        merged(deepspeed, pp=pp)
    assert str(error.value) == f"ds.json: {message}"


@pytest.mark.parametrize("setting", [{"zero_hpz_partition_size": 2}, {"zero_quantized_gradients": True}])
def test_zero_plus_plus_does_not_mix_tensor_parallel_ranks(setting: dict[str, Any]) -> None:
    """Its groups are consecutive ranks: with tp 2 losses and norms were wrong from the first step."""
    run = run_with({"zero_optimization": {"stage": 3, **setting}}, tp=2)
    (key,) = setting
    with pytest.raises(UserError, match=f"^ds.json: zero_optimization.{key} with parallel.tp = 2: DeepSpeed groups"):
        deepspeed_config(run, resolve_layout(run, 4), bf16_native=True)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("name", "muon", "DeepSpeed offloads AdamW only"),
        ("name", "lion", "DeepSpeed offloads AdamW only"),
        ("state_dtype", "bf16", "DeepSpeed's CPU Adam has fp32 moments"),
        ("masters", "bf16_kahan", "DeepSpeed's CPU Adam has fp32 masters"),
    ],
)
def test_only_adamw_with_fp32_states_is_offloaded(key: str, value: str, why: str) -> None:
    run = replace(run_with({}), optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0, **{key: value}))
    for stage, section in ((2, "offload_optimizer"), (3, "offload_param")):
        found = replace(run, deepspeed={"zero_optimization": {"stage": stage, section: {"device": "cpu"}}})
        with pytest.raises(UserError) as error:
            deepspeed_config(found, resolve_layout(found, 1), bf16_native=True)
        place = f"ds.json: zero_optimization.{section}.device = cpu with optimizer.{key} = {value}"
        default = getattr(OptimizerConfig, key)
        assert str(error.value) == f"{place}: {why}; take it out, or use optimizer.{key} = {default}"


@pytest.mark.parametrize(
    ("deepspeed", "parallel", "message"),
    [
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}}, {}, "in a run in fp32; enable bf16"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, {}, "with zero_optimization.stage = 2: "),
        (
            {
                "zero_optimization": {"stage": 1},
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "bf16"},
            },
            {"pp": 2},
            "with data_types.grad_accum_dtype = bf16: ",
        ),
        (
            {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
            {"pp": 2, "schedule": "deepspeed"},
            "with parallel.schedule = deepspeed: ",
        ),
    ],
)
def test_bf16_masters_are_refused_where_gradients_would_be_rounded(
    deepspeed: dict[str, Any], parallel: dict[str, Any], message: str
) -> None:
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=0, masters="bf16_stochastic")
    run = replace(run_with(deepspeed, **parallel), optimizer=optimizer)
    with pytest.raises(UserError) as error:
        deepspeed_config(run, resolve_layout(run, 2), bf16_native=True)
    assert f": optimizer.masters = bf16_stochastic {message}" in str(error.value)


def test_defaults_and_keys_of_the_stage_are_accepted() -> None:
    """Files that list every key with DeepSpeed's default are common, and ask for nothing."""
    spelled = {"stage": 1, "overlap_comm": False, "stage3_max_live_parameters": 1e9, "reduce_bucket_size": 5e8}
    extra = {"fp16": {"enabled": False, "loss_scale": 0}, "comms_logger": {"enabled": False}, "dump_state": False}
    offload = {"offload_optimizer": {"device": "none"}}
    config = merged({"zero_optimization": {**spelled, **offload}, "bf16": {"enabled": True}, **extra}, pp=2)
    assert config["zero_optimization"] == {**spelled, **offload}
    merged({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 5, "reduce_bucket_size": 1e6}})
