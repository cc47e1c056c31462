"""Rules between the keys of one section of `config/schema.py`; each section checks its own on construction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_ds.config.context_parallel import HIERARCHICAL
from llama_ds.config.numbers import near_divisors
from llama_ds.config.recompute import AUTO, POLICIES, parse
from llama_ds.errors import did_you_mean, listed, shortened
from llama_ds.schedules.schedule import IN_A_V
from llama_ds.schedules.zero_bubble_v import V_SCHEDULES

if TYPE_CHECKING:
    from llama_ds.config.schema import (
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        RopeScaling,
    )

STOCK_ENGINE = "deepspeed"  # value of parallel.schedule: DeepSpeed's unmodified PipelineEngine, a baseline


# Kinds of rotary scaling: the keys that each requires beside `factor`, and those that it also takes.
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama3": (("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "linear": ((), ()),
    "dynamic": (("original_max_position_embeddings",), ()),
    "yarn": (
        ("original_max_position_embeddings",),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
YARN_FAST, YARN_SLOW = 32.0, 1.0  # defaults of beta_fast and beta_slow


def check_rope_scaling(scaling: RopeScaling) -> None:
    """Check that the keys are those of the kind, and that the factors order the frequencies."""
    required, optional = ROPE_KEYS[scaling.rope_type]
    given = scaling.parameters()
    for key in required:
        if key not in given:
            raise scaling.broken(f"model.rope_scaling.{key} is missing; rope_type {scaling.rope_type} has no default")
    for key in given:
        if key not in ("factor", *required, *optional):
            raise scaling.broken(
                f"model.rope_scaling.{key} = {given[key]} is not a key of rope_type {scaling.rope_type}; leave it out"
            )
    if scaling.factor < 1:
        raise scaling.broken(f"model.rope_scaling.factor = {scaling.factor} is below 1; it is new / original length")
    if scaling.rope_type == "llama3" and not 0 < given["low_freq_factor"] < given["high_freq_factor"]:
        raise scaling.broken(
            f"model.rope_scaling.low_freq_factor = {scaling.low_freq_factor} is not between 0 and "
            f"high_freq_factor = {scaling.high_freq_factor}; Llama 3.1 has 1 and 4"
        )
    fast, slow = given.get("beta_fast", YARN_FAST), given.get("beta_slow", YARN_SLOW)
    if slow >= fast:
        raise scaling.broken(f"model.rope_scaling.beta_slow = {slow} is not below beta_fast = {fast}")


def check_model(model: ModelConfig) -> None:
    """Check that heads share key-value heads evenly, and that head_dim is even, as the rotation requires."""
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    if heads % groups:
        raise model.broken(
            f"model.num_key_value_heads = {groups} does not divide model.num_attention_heads = {heads}; "
            f"use {listed(near_divisors(heads, groups))}"
        )
    if model.head_dim % 2:
        raise model.broken(f"model.head_dim = {model.head_dim} is odd; rotary embeddings rotate pairs; use an even one")
    kind = model.rope_scaling.rope_type if model.rope_scaling else ""
    if kind == "dynamic" and model.head_dim == 2:
        raise model.broken("model.head_dim = 2 has one frequency, which rope_type dynamic keeps; use 4 or more")
    if kind == "yarn" and model.rope_theta <= 1:
        raise model.broken(f"model.rope_theta = {model.rope_theta} is not above 1, as rope_type yarn requires")
    _check_mup(model)


def _check_mup(model: ModelConfig) -> None:
    """Refuse a base that is so far from the model that one of the two must be a mistake."""
    if model.mup is None:
        return
    for key, own in (("base_width", "hidden_size"), ("base_head_dim", "head_dim")):
        base, size = getattr(model.mup, key), getattr(model, own)
        if base is not None and not size <= MUP_MOST * base <= MUP_MOST**2 * size:
            raise model.broken(
                f"model.mup.{key} = {base} is the {own} of the model on which hyperparameters were tuned, and not "
                f"within a factor of {MUP_MOST} of model.{own} = {size}; use {-(-size // MUP_MOST)} to "
                f"{size * MUP_MOST}"
            )


MUP_MOST = 256  # largest ratio of a size to that of the base model
EPS = 1e-8  # AdamW's
STATE_DTYPES = ("fp32", "bf16")
EIGHT_BITS = ("int8", "uint8", "fp8", "8bit")

# Muon's keys, and the values that they have with another optimizer.
WITHOUT_MUON = {"muon_lr": None, "momentum": 0.95, "nesterov": True, "muon_scale": "moonlight"}


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Check the ranges of the betas and of the final learning rate, and that keys belong to optimizer and schedule."""
    for i, beta in enumerate(optimizer.betas):
        if not 0 <= beta < 1:
            raise optimizer.broken(f"optimizer.betas.{i} = {beta} is not in [0, 1)")
    if optimizer.min_lr_ratio > 1:
        raise optimizer.broken(
            f"optimizer.min_lr_ratio = {optimizer.min_lr_ratio} is above 1; it is final / peak learning rate"
        )
    if optimizer.momentum >= 1:
        raise optimizer.broken(f"optimizer.momentum = {optimizer.momentum} is not below 1; Muon's usual one is 0.95")
    if optimizer.name == "lion" and optimizer.eps != EPS:
        raise optimizer.broken(f"optimizer.eps = {optimizer.eps} is for AdamW's second moment; leave it out with lion")
    if optimizer.state_dtype in EIGHT_BITS:
        raise optimizer.broken(
            f"optimizer.state_dtype = {optimizer.state_dtype}: torchao and bitsandbytes scale blocks of a rank's "
            "buffer, so that a run's numbers would depend on its layout; use bf16"
        )
    if optimizer.state_dtype not in STATE_DTYPES:
        raise optimizer.broken(
            f"optimizer.state_dtype = {shortened(repr(optimizer.state_dtype))} is not {listed(STATE_DTYPES)}"
        )
    for key, default in WITHOUT_MUON.items():
        if optimizer.name != "muon" and (value := getattr(optimizer, key)) != default:
            raise optimizer.broken(f"optimizer.{key} = {value} is for Muon; set optimizer.name = muon, or leave it out")
    schedule = optimizer.schedule
    if schedule != "wsd" and optimizer.decay_steps:
        raise optimizer.broken(
            f"optimizer.decay_steps = {optimizer.decay_steps} is for schedule wsd; leave it out with {schedule}"
        )
    if schedule != "wsd" and optimizer.decay_shape != "sqrt":
        raise optimizer.broken(
            f"optimizer.decay_shape = {optimizer.decay_shape} is for schedule wsd; leave it out with {schedule}"
        )


def check_parallel(parallel: ParallelConfig) -> None:
    """Check that options fit the numbers of ranks and stages."""
    tp, pp, virtual = parallel.tp, parallel.pp, parallel.virtual_stages
    if parallel.sequence_parallel and tp == 1:
        raise parallel.broken(
            "parallel.sequence_parallel = true shares rows over tp ranks and tp is 1; set it to false"
        )
    if parallel.tp_chunks > 1 and tp == 1:
        raise parallel.broken(
            f"parallel.tp_chunks = {parallel.tp_chunks} overlaps the collectives of tp ranks and tp is 1; set it to 1"
        )
    if parallel.cp == 1 and parallel.cp_method != "auto":
        raise parallel.broken(
            f"parallel.cp_method = {parallel.cp_method} shares rows over cp ranks and cp is 1; leave it out"
        )
    if parallel.cp_all_to_all and parallel.cp_method != HIERARCHICAL:
        raise parallel.broken(
            f"parallel.cp_all_to_all = {parallel.cp_all_to_all} is for cp_method hierarchical; leave it out with "
            f"{parallel.cp_method}"
        )
    if virtual > 1 and pp == 1:
        raise parallel.broken(f"parallel.virtual_stages = {virtual} cuts what pipeline ranks hold and pp is 1; use 1")
    if virtual > 1 and parallel.schedule == STOCK_ENGINE:
        raise parallel.broken(
            f"parallel.virtual_stages = {virtual}: DeepSpeed's own engine has one stage on a rank; use 1"
        )
    if parallel.extra_warmup and not parallel.own_pipeline:
        raise parallel.broken(
            f"parallel.extra_warmup = {parallel.extra_warmup} is for pp > 1 and this stack's own schedules; use 0 with "
            f"pp {pp} and {parallel.schedule}"
        )
    if parallel.pass_times is not None and parallel.schedule not in V_SCHEDULES:
        raise parallel.broken(
            f"parallel.pass_times orders schedule {listed(V_SCHEDULES)}; leave it out with {parallel.schedule}"
        )
    if parallel.post_validation and (parallel.pp == 1 or parallel.schedule not in IN_A_V):
        raise parallel.broken(
            f"parallel.post_validation = true is for pp > 1 and schedule {listed(IN_A_V)}, whose first rank "
            f"has embedding and loss; set it to false with pp {pp} and {parallel.schedule}"
        )
    for key in ("joint_weight_gradients", "gradient_neighbours"):
        if getattr(parallel, key) > 1 and not parallel.own_pipeline:
            raise parallel.broken(
                f"parallel.{key} = {getattr(parallel, key)} is for pp > 1 and this stack's own schedules; use 1 with "
                f"pp {pp} and {parallel.schedule}"
            )
    _check_partition(parallel)
    _check_recompute(parallel)


def _check_partition(parallel: ParallelConfig) -> None:
    partition, stages = parallel.partition, parallel.pp * parallel.virtual_stages
    if partition is None:
        return
    if len(partition) != stages:
        virtual = f" * virtual_stages = {stages}" if stages > parallel.pp else f" = {parallel.pp}"
        raise parallel.broken(f"parallel.partition = {list(partition)} has {len(partition)} entries, not pp{virtual}")
    if min(partition) < 1:
        raise parallel.broken(f"parallel.partition = {list(partition)}: every stage needs a decoder layer or more")


def _check_recompute(parallel: ParallelConfig) -> None:
    text, stages = parallel.recompute, parallel.pp * parallel.virtual_stages
    found = parse(text)
    if found is None:
        raise parallel.broken(
            f"parallel.recompute = {shortened(repr(text))} is not {listed(POLICIES)}, a list of these for each stage, "
            f"or {{budget: 20 GiB}}, auto or {{auto: 80 GiB}}{did_you_mean(text[:80], (*POLICIES, AUTO))}"
        )
    if len(found.policies) not in (0, 1, stages):
        raise parallel.broken(
            f"parallel.recompute = {shortened(text)} names {len(found.policies)} stages of {stages}; name one or "
            f"{stages}"
        )
